"""The hyper-network by hand, heads of tasks, and a run of two tasks on an encoder."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification

import luthier
from helpers.tuners import IDS, base, logprobs, put
from luthier.errors import RecipeError
from luthier.methods.tuners._base import Untuned

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def classifier(classes: int = 3) -> Any:
    torch.manual_seed(0)
    config: Any = BertConfig(**cast(Any, SIZES), intermediate_size=64, initializer_range=0.15)
    config.num_labels = classes
    return BertForSequenceClassification(config).eval()


def tuned(model: Any = None, std: float = 0.3, **settings: Any) -> Any:
    attached: Any = put("hyper_adapter", model, tasks=["a", "b"], embedding=4, hidden=6, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in attached.parameters().values():
            p.add_(std * torch.randn(p.shape, generator=generator))
    return attached


@torch.no_grad()
def test_adapters_are_the_hyper_network_of_task_and_place():
    attached = tuned()
    generated = {}
    for name, layer in attached.layers.items():
        p = layer.tensors("default")
        for task in (0, 1):
            z = torch.relu(p.first @ torch.cat([p.task[task], p.place]) + p.first_bias)
            parts = [torch.einsum("...h,h->...", m, z) for m in (p.downs, p.ups, p.scales, p.shifts)]
            own = attached.settings.adapter(p, task)
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(own, parts, strict=True))
            generated[name, task] = torch.cat([part.flatten() for part in own])
        attached.set_route(torch.tensor([1, -1]))
        x = torch.randn(2, 3, layer.base_layer.in_features)
        y = layer.base_layer(x)
        down, up, gamma, beta = parts
        inner = torch.relu(y[0] @ down.T) @ up.T
        normed = (inner - inner.mean(-1, keepdim=True)) / inner.var(-1, False, keepdim=True).add(1e-5).sqrt()
        assert torch.allclose(layer(x)[0], y[0] + gamma * normed + beta, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer(x)[1], y[1])  # a row of no task is read by the base
    values = list(generated.values())
    assert len(values) == 8
    for i, one in enumerate(values):
        assert not any(torch.allclose(one, other, atol=1e-3) for other in values[:i])
    params = [layer.tensors("default") for layer in attached.layers.values()]
    for slot in attached.settings.shared:
        assert len({id(getattr(p, slot)) for p in params}) == 1
    assert len({id(p.place) for p in params}) == 4


@torch.no_grad()
def test_without_a_step_every_task_is_the_base():
    for tasks in (None, ["a", "b"]):
        attached = put("hyper_adapter", classifier(), tasks=tasks)
        attached.set_route(torch.tensor([1, 0]))
        assert torch.allclose(attached.model(IDS).logits, classifier()(IDS).logits, atol=1e-6)
    text, untuned = put("hyper_adapter", None, tasks=None), Untuned(cast(Any, base()))
    assert torch.equal(logprobs(text), logprobs(untuned))
    with pytest.raises(RecipeError, match="different names"):
        put("hyper_adapter", None, tasks=["a", "a"])


def test_a_task_leaves_the_heads_of_others_without_gradient():
    attached = tuned(classifier())
    assert attached.settings.head == "classifier"
    p = attached.layers["classifier"].tensors("default")
    attached.set_route(torch.tensor([0, 0]))
    logits = attached.model(IDS).logits
    F.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert p.heads.grad[0].abs().max() > 0 and p.biases.grad[0].abs().max() > 0
    assert torch.equal(p.heads.grad[1], torch.zeros_like(p.heads[1]))
    assert torch.equal(p.biases.grad[1], torch.zeros_like(p.biases[1]))
    # of a batch that mixes tasks each row is read as by itself
    with torch.no_grad():
        attached.set_route(torch.tensor([1, 1]))
        other = attached.model(IDS).logits
        attached.set_route(torch.tensor([0, 1]))
        mixed = attached.model(IDS).logits
    assert torch.allclose(mixed[0], logits[0], atol=1e-5) and torch.allclose(mixed[1], other[1], atol=1e-5)
    assert not torch.allclose(other, logits, atol=1e-2)
    shared = tuned(classifier(), heads=False)
    assert not any(name.startswith("classifier") for name in shared.layers)


@pytest.mark.long
def test_a_run_of_two_tasks_on_an_encoder_learns_both(tmp_path):
    """The same texts with opposite answers: nothing but the task tells them apart."""
    from luthier.data.load import load_rows

    rows = load_rows({"path": "toy:sentiment", "n": 64}).rows
    names = sorted({row["completions"][0] for row in rows})[:2]
    both = []
    for row in rows:
        label = row["completions"][0]
        if label in names:
            other = names[1 - names.index(label)]
            both.append({"prompt": row["prompt"], "completion": label.strip(), "task": "a"})
            both.append({"prompt": row["prompt"], "completion": other.strip(), "task": "b"})
    report = luthier.tune(
        model="toy:encoder",
        architecture="classifier",
        data=both,
        tuner={"name": "hyper_adapter", "tasks": ["a", "b"], "embedding": 8, "hidden": 16},
        learning_rate=1e-2,
        max_steps=30,
        evaluate=["loss"],
        output_dir=str(tmp_path / "run"),
    )
    assert sum(report.losses[-5:]) < 0.6 * sum(report.losses[:5]), report.losses
