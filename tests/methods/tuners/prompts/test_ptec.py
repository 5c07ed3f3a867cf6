"""PTEC: what trains, the linear probe without vectors, columns by label, padding behind a prompt, a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import luthier
from helpers.tuners import IDS, base, batch, logprobs, put, train
from luthier.errors import RecipeError
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy
from luthier.registry import build


def test_what_trains_is_the_prompt_and_the_head():
    model: Any = base("labels")
    width = model.config.hidden_size
    attached = put("ptec", model, num_virtual_tokens=7)
    assert sum(p.numel() for p in attached.parameters().values()) == 7 * width + width * 5
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(attached, steps=2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"score.weight"}
    torch.manual_seed(0)
    bert: torch.nn.Module = BertForSequenceClassification(
        BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    attached = put("ptec", bert, num_virtual_tokens=0)  # with a bias
    assert sum(p.numel() for p in attached.parameters().values()) == (32 + 1) * 2


def test_without_vectors_it_is_a_linear_probe():
    """The head after four steps is that of a linear layer trained on the frozen features."""
    attached = put("ptec", base("labels"), num_virtual_tokens=0)
    model, rows = attached.model, batch(attached.model)
    with torch.no_grad():
        features = model.model(input_ids=IDS).last_hidden_state[:, -1]
    probe = torch.nn.Linear(features.shape[1], 5, bias=False)
    probe.weight.data.copy_(model.score.weight)
    labels = rows.labels[rows.targets]
    torch.testing.assert_close(
        logprobs(attached).detach(), probe(features).log_softmax(-1).gather(1, labels[:, None])[:, 0].detach()
    )
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(probe(features), labels).backward()
        optimizer.step()
    train(attached, steps=4)
    torch.testing.assert_close(model.score.weight.detach(), probe.weight.detach(), atol=1e-5, rtol=1e-4)


def test_labels_in_another_order_are_other_columns():
    attached, order = put("ptec", base("labels"), num_virtual_tokens=3), torch.tensor([3, 0, 4, 1, 2])
    arch, rows = build("architecture", "classifier"), batch(attached.model)
    own = arch.forward(attached.model, attached, rows).hidden
    with torch.no_grad():
        attached.model.score.weight.copy_(attached.model.score.weight[order].clone())
    torch.testing.assert_close(arch.forward(attached.model, attached, rows).hidden, own[:, order])


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_padding_changes_nothing_behind_a_prompt(kind):
    """Texts of different lengths in one batch answer as each does alone, by the network's own forward."""
    from types import SimpleNamespace

    from luthier.model.batch import collate

    shape: dict[str, Any] = dict(
        num_labels=3, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(vocab_size=97, pad_token_id=0, initializer_range=0.3, **shape)
        model = LlamaForSequenceClassification(config).eval()
    else:
        model = BertForSequenceClassification(BertConfig(vocab_size=97, **shape)).eval()
    network: Any = model
    attached = put("ptec", model, num_virtual_tokens=4)
    rng, rows = torch.Generator().manual_seed(1), []
    for i, length in enumerate((3, 9, 1, 6)):
        ids = torch.randint(3, 97, (length,), generator=rng).tolist()
        rows.append(
            {"id": str(i), "e": SimpleNamespace(prompt=ids, completions=[[i % 3]], supervised=[[True]])}
        )
    read = collate(rows, lambda row: row["e"])
    arch = build("architecture", "classifier")
    with torch.no_grad():
        own, alone = arch.forward(model, attached, read).logprobs, arch.plain(model, attached, read)
        without = arch.forward(model, Untuned(network), read).logprobs
    torch.testing.assert_close(own, alone, atol=1e-5, rtol=1e-4)
    assert (own - without).abs().max() > 1e-3


def test_networks_that_need_tokens_are_refused():
    from transformers import BartConfig, BartForSequenceClassification

    config = BartConfig(
        vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    attached = put("ptec", BartForSequenceClassification(config).eval(), num_virtual_tokens=2)
    policy = Policy(build("architecture", "classifier"), attached.model, attached)
    with pytest.raises(RecipeError, match="by its tokens"):
        policy(batch(attached.model))
    with pytest.raises(RecipeError, match="needs architecture classifier"):
        put("ptec", base("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["prompt", "head", "both"])
def test_it_learns_several_labels_on_a_frozen_network(part, tmp_path):
    """Each part alone by its own rate, and both; what a run saved is what it ended with."""
    rates = {"prompt": {"default": 0.1, "score": 0}, "head": {"default": 1e-2, "embeddings": 0}}
    report = luthier.tune(
        model="toy:lm-small",
        architecture={"name": "classifier", "problem_type": "multi_label_classification"},
        data={"path": "toy:multilabel", "n": 300},
        eval_data={"path": "toy:multilabel/test", "n": 60},
        tuner={"name": "ptec", "num_virtual_tokens": 10, "prompt_tuning_init": "labels"},
        learning_rate=rates.get(part, {"default": 0.1, "score": 1e-2}),
        max_steps=40,
        evaluate=["loss", "labels"],
        output_dir=str(tmp_path),
    )
    assert report.after["loss"] < report.before["loss"] - 0.1
    assert luthier.load(report.folder).roles.tuner.virtual == 10
