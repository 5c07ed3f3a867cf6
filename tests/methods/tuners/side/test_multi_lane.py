"""MULTI-LANE: no interference, the frozen network as a special case, its cost, and two tasks of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

import luthier
from helpers.media import make_vit
from helpers.tuners import put
from luthier.clock import Clock
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.model.policy import Policy, Roles
from luthier.registry import build
from luthier.storage import checkpoints

pytest.importorskip("PIL")

TASKS = {"upper": ["a", "b"], "lower": ["c", "d"]}


def network(width: int = 16, layers: int = 2) -> Any:
    """A vision transformer of 4 patches with classes a, b, c and d."""
    torch.manual_seed(0)
    names: Any = {"id2label": dict(enumerate("abcd")), "label2id": {name: i for i, name in enumerate("abcd")}}
    shape: Any = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    patches: Any = {"image_size": 16, "patch_size": 8, "num_attention_heads": 2, "initializer_range": 0.2}
    return ViTForImageClassification(ViTConfig(**shape, **patches, **names)).eval()


def pixels(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def fill(attached: Any, learned: int | None = None) -> Any:
    """With numbers in all tensors, and so many lanes that have learned."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in attached.parameters().values():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    if learned is not None:
        attached.fixed["learned"][:] = torch.arange(len(attached.labels)) < learned
    return attached


def quarters(marks: list[int], seed: int) -> Any:
    """An image whose quarters are light where the mark is 1."""
    from PIL import Image

    field = np.kron(np.array(marks).reshape(2, 2), np.ones((8, 8)))
    noise = np.random.default_rng(seed).normal(0, 20, (16, 16, 3))
    return Image.fromarray((60 + 140 * field[..., None] + noise).clip(0, 255).astype(np.uint8))


def rows_of(task: str, count: int, seed: int = 0) -> list[dict]:
    """Images and which of the two labels of a task they have."""
    rng, first, rows = np.random.default_rng(seed), 2 * (task == "lower"), []
    for i in range(count):
        marks = [int(mark) for mark in rng.integers(0, 2, 4)]
        labels = ["abcd"[k] for k in (first, first + 1) if marks[k]]
        rows.append({"image": quarters(marks, 1000 * seed + i), "labels": labels, "source": task})
    return rows


def mean_average_precision(scores: Tensor, marks: Tensor) -> float:
    values = []
    for score, mark in zip(scores.T, marks.T, strict=True):
        ranked = mark[score.argsort(descending=True)].double()
        precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
        values.append(float((precision * ranked).sum() / ranked.sum()))
    return sum(values) / len(values)


def roles_of(path: str, rows: list[dict], tuner: dict) -> Roles:
    architecture = build("architecture", {"name": "image_classifier"})
    model = architecture.load(path, dtype=torch.float32, **architecture.fit_to(rows)).eval()
    renderer = architecture.renderer(architecture.tokenizer(path), model.config)
    torch.manual_seed(0)
    attached = build("tuner", tuner).attach(model)
    return Roles(Policy(architecture, model, attached), Clock(), renderer)


def test_a_later_task_leaves_older_logits_bit_for_bit(tmp_path):
    """Rows train the lane of their task alone, with the logits of its classes alone."""
    path = make_vit(tmp_path)
    rows = load_rows([*rows_of("upper", 4), *rows_of("lower", 4)]).rows
    tuner = {"name": "multi_lane", "tasks": TASKS, "selectors": 3, "num_virtual_tokens": 2}
    roles = roles_of(path, rows, tuner)
    attached: Any = fill(roles.policy.attached, learned=1)
    model, images = roles.policy.model, pixels()
    with torch.no_grad():
        before = model(pixel_values=images).logits
    assert torch.equal(before[:, 2:], torch.zeros(3, 2))
    later = [row for row in rows if row["source"] == "lower"]
    attached.ready(later, roles)
    assert [group.name for group in attached.param_groups()] == ["lane.lower"]
    upper, lower = attached.slots("upper"), attached.slots("lower")
    assert torch.equal(upper["keys"], lower["keys"]) and torch.equal(upper["selectors"], lower["selectors"])
    roles.policy.train()
    adam = torch.optim.Adam([p for p in attached.parameters().values() if p.requires_grad], lr=0.1)
    for _ in range(3):
        adam.zero_grad()
        batch = roles.batch(later)
        logprobs = roles.policy.logprobs(batch).view(-1, 4)
        # the labels of the other lane are as likely as not, and teach nothing
        assert torch.allclose(logprobs[:, :2], torch.tensor(0.5).log())
        (-logprobs.sum()).backward()
        adam.step()
        attached.after_step(Clock())
    assert all(p.grad is None for p in upper.values()) and all(p.grad is not None for p in lower.values())
    model.eval()
    with torch.no_grad():
        after = model(pixel_values=images).logits
    assert torch.equal(after[:, :2], before[:, :2]) and (after[:, 2:] != 0).all()


@torch.no_grad()
def test_a_summary_of_single_patches_is_the_frozen_network():
    """S = N selectors that choose one patch each, and no prompts: the lane's state is the class token."""
    model = network()
    out = model(pixel_values=pixels(1), output_hidden_states=True)
    attached = fill(put("multi_lane", model, selectors=4, prompt_layers=0))
    layer, state = attached.layers[0], out.hidden_states[0]
    patches = layer.before(state)[0, 1:]
    # softmax(1000 (pinv X) X') is the identity
    attached.slots("all")["selectors"].copy_(1e3 * torch.linalg.pinv(patches).T)
    weights = (attached.slots("all")["selectors"] @ patches.T / 16**0.5).softmax(-1)
    assert torch.allclose(weights @ patches, patches, atol=1e-5)
    c = layer.read(state[:, :1], weights @ patches[None], None)
    assert torch.allclose(c, out.hidden_states[1][:, :1], atol=1e-5)
    # the last state and its head, by hand
    second = attached.layers[1]
    normed = second.before(out.hidden_states[1])[0, 1:]
    attached.slots("all")["selectors"].copy_(1e3 * torch.linalg.pinv(normed).T)
    weights = (attached.slots("all")["selectors"] @ normed.T / 16**0.5).softmax(-1)
    c = second.read(c, weights @ normed[None], None)
    last = model.base_model(pixel_values=pixels(1)).last_hidden_state[:, 0]
    assert torch.allclose(attached.final(c)[:, 0], last, atol=1e-5)


@torch.no_grad()
def test_prompts_are_keys_and_values_before_those_of_the_lane():
    attached = fill(put("multi_lane", network(), selectors=2, num_virtual_tokens=3, prompt_layers=1))
    p, layer = attached.slots("all"), attached.layers[0]
    assert p["keys"].shape == (1, 3, 16)
    state = attached.model.base_model.embeddings(pixels(2))
    c, normed = state[:, :1], layer.before(state)
    summary = (p["selectors"] @ normed[:, 1:].transpose(1, 2) / 4).softmax(-1) @ normed[:, 1:]
    tokens = torch.cat([layer.before(c), summary], 1)
    q, k, v = (layer.parts[part](tokens) for part in "qkv")
    k, v = (torch.cat([p[n][0].expand(2, -1, -1), x], 1) for n, x in (("keys", k), ("values", v)))
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        scores = q[:, :1, head] @ k[..., head].transpose(1, 2) / 8**0.5
        heads.append(scores.softmax(-1) @ v[..., head])
    c = c + layer.parts["o"](torch.cat(heads, -1))
    expected = c + layer.mlp(layer.after(c))
    own = layer.read(state[:, :1], summary, (p["keys"][0], p["values"][0]))
    assert torch.allclose(own, expected, atol=1e-5)


@torch.no_grad()
def test_cost_grows_linearly_with_the_lanes():
    """Each lane costs the same, at most what S + 1 tokens cost in the frozen layers; S enters linearly."""
    tasks = {name: [name] for name in "abcd"}

    def cost(lanes: int, selectors: int) -> int:
        model = network(width=64, layers=3)
        attached = put("multi_lane", model, tasks=tasks, selectors=selectors, num_virtual_tokens=2)
        with FlopCounterMode(display=False) as counter:
            fill(attached, learned=lanes).model(pixel_values=pixels(1))
        return counter.get_total_flops()

    costs = {s: [cost(lanes, s) for lanes in range(5)] for s in (4, 8, 12)}
    slopes = {}
    for s, values in costs.items():
        steps = {after - before for before, after in zip(values, values[1:], strict=False)}
        assert len(steps) == 1
        slopes[s] = steps.pop()
    assert slopes[12] - slopes[8] == slopes[8] - slopes[4] > 0
    token = 3 * 2 * (4 * 64**2 + 2 * 64 * 256)  # of one token in three layers, without attention's scores
    assert token < slopes[4] < 5 * token


def test_what_does_not_fit_is_refused():
    sizes: Any = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(RecipeError, match="reads along layers of norm, attention"):
        put("multi_lane", BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16)))
    model = network()
    for tasks, match in (
        ({"x": ["a"], "y": ["a"]}, "can be one of one task"),
        ({"x": ["a", "e"]}, "no row has the class 'e'"),
        ({"x": ["a", "b", "c"]}, "class 'd' is of no task"),
    ):
        with pytest.raises(RecipeError, match=match):
            put("multi_lane", model, tasks=tasks)
    attached = put("multi_lane", model, tasks=TASKS)
    with pytest.raises(RecipeError, match=r"source is 'uper'.*'upper'"):
        attached.ready([{"source": "uper"}], None)


@pytest.mark.long
def test_two_tasks_of_several_labels(tmp_path):
    """Learned one after the other: the first task stays as it was, the second is learned."""
    path = make_vit(tmp_path / "vit")  # for its image processor
    network(width=48).save_pretrained(path)
    data = [*rows_of("upper", 300), *rows_of("lower", 300)]
    tests = {task: rows_of(task, 100, seed=1) for task in TASKS}
    tuner = {
        "name": "multi_lane",
        "tasks": TASKS,
        "selectors": 8,
        "num_virtual_tokens": 4,
        "copy_last": False,
    }
    done = luthier.tune(
        model=path,
        architecture={"name": "image_classifier", "problem_type": "multi_label_classification"},
        data=data,
        eval_data=[row for rows in tests.values() for row in rows[:10]],
        tuner=tuner,
        plan={"name": "continual", "tasks": list(TASKS)},
        learning_rate=0.1,
        num_train_epochs=20,
        per_device_train_batch_size=16,
        output_dir=str(tmp_path / "run"),
    )
    precision: dict[str, list[float]] = {task: [] for task in TASKS}
    for run in done.runs:
        every = load_rows(data).rows
        roles = roles_of(path, every, tuner)
        roles.policy.attached.load(checkpoints.load(checkpoints.paths(Path(run))[-1]).tensors)
        for task, labels in TASKS.items():
            batch = roles.batch(load_rows(tests[task]).rows)
            with torch.no_grad():
                outputs = roles.policy.outputs(batch)
            columns = ["abcd".index(label) for label in labels]
            scores = (outputs.hidden[:, 1] - outputs.hidden[:, 0]).view(-1, 4)[:, columns]
            marks = batch.labels[batch.targets].view(-1, 4)[:, columns]
            precision[task].append(mean_average_precision(scores, marks))
    first, second = precision["upper"], precision["lower"]
    assert first[0] == first[1] > 0.9 and second[1] > 0.9 > second[0], precision
