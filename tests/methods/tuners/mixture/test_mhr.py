"""MHR: PEFT's Poly and LoRA as its cases, mixed batches, adaptation, and tasks too many for one adapter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PolyConfig, get_peft_model

from helpers.tuners import IDS, base, logprobs, put
from helpers.weight_tuners import numbers
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.model.batch import collate
from luthier.model.generate import Cached, Rereading, generate
from luthier.registry import build, provides_of

TASKS = ["a", "b"]
Q = "model.layers.0.self_attn.q_proj"


def filled(**settings):
    attached = put("mhr", **{"target_modules": ["q_proj", "down_proj"], "r": 3, **settings})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in attached.parameters().items():
            p.normal_(std=2.0 if name.endswith("Z") else 0.3, generator=generator)
    return attached


def rows_of(tasks):
    """A batch of these tasks' rows."""
    rows = [{"id": i, "ids": IDS[i % 2].tolist(), "task": task} for i, task in enumerate(tasks)]
    encode = lambda r: SimpleNamespace(
        prompt=r["ids"][:3], completions=[r["ids"][3:], r["ids"][2:5]], supervised=[[True] * 4, [True] * 3]
    )
    return collate(rows, encode)


def read(attached, tasks, **how):
    return Causal(**how).forward(attached.model, attached, rows_of(tasks)).logprobs


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 4])
def test_blocks_and_skills_are_pefts_poly(heads):
    ours = filled(skills=3, heads=heads, tasks=TASKS, target_modules=["q_proj"])
    config = PolyConfig(target_modules=["q_proj"], r=3, n_tasks=2, n_skills=3, n_splits=heads)
    theirs = get_peft_model(base(), config).eval()
    inside: Any = theirs.base_model.model
    for name, layer in inside.named_modules():
        if name.endswith("q_proj"):
            p = ours.layers[name].tensors("default")
            A = p.A.reshape(3, 3, heads, -1).permute(2, 0, 3, 1)  # splits, skills, in / splits, r
            B = p.B.reshape(3, heads, -1, 3).permute(1, 0, 3, 2)
            layer.poly_lora_A["default"].copy_(A)
            layer.poly_lora_B["default"].copy_(B)
            layer.poly_router["default"].module_logits.copy_(p.Z.flatten(1))
    ours.set_route(torch.tensor([0, 1]))
    want = theirs.base_model(IDS, task_ids=torch.tensor([0, 1])).logits
    assert torch.allclose(ours.model(IDS).logits, want, atol=1e-5)
    assert not torch.allclose(ours.model(IDS).logits, base()(IDS).logits, atol=1e-2)


@torch.no_grad()
def test_one_skill_is_lora():
    ours = filled(skills=1, heads=1)
    lora = put("lora", r=3, lora_alpha=1, target_modules=["q_proj", "down_proj"])
    for name, p in lora.parameters().items():
        p.copy_(ours.parameters()[name][0])
    assert torch.allclose(logprobs(ours), logprobs(lora), atol=1e-5)
    assert "merge" in provides_of(ours.settings)
    assert "merge" not in provides_of(build("tuner", {"name": "mhr", "tasks": TASKS}))


@torch.no_grad()
def test_a_mixed_batch_is_each_task_alone():
    attached = filled(skills=3, heads=4, tasks=TASKS)
    mixed = read(attached, ["a", "b", "b", "a"])
    for i, task in enumerate(["a", "b", "b", "a"]):
        tasks = [task] * 4
        assert torch.allclose(read(attached, tasks)[i * 7 : i * 7 + 7], mixed[i * 7 : i * 7 + 7], atol=1e-5)
    assert not torch.allclose(mixed[:7], read(attached, ["b"] * 4)[:7], atol=1e-2)
    padded = read(attached, ["a", "b", "b", "a"], packing=False, share_prompts=False)
    assert torch.allclose(padded, mixed, atol=1e-5)
    # the weight that a task's mixture makes gives what its rows are read under
    layer, x = attached.layers[Q], torch.randn(2, 5, 32)
    p = layer.tensors("default")
    A, B = attached.settings.mixed(p, 1)
    attached.set_route(torch.tensor([1, 1]))
    dense = torch.nn.functional.linear(x, layer.base_layer.weight + B @ A / 3)
    assert torch.allclose(layer(x), dense, atol=1e-5)
    with pytest.raises(RecipeError, match="does not list in tasks"):
        read(attached, ["c"])


@torch.no_grad()
def test_answers_are_written_under_the_rows_task():
    attached = filled(skills=3, heads=2, tasks=TASKS)
    prompts, rows = [[5, 6, 7], [8, 9, 10, 11], [5, 6, 7]], [{"task": t} for t in ("a", "b", "b")]
    how = {"seeds": [0, 1, 2], "n": 2, "max_new_tokens": 5, "temperature": 0.0}
    written = [generate(w(attached.model, attached), prompts, rows=rows, **how) for w in (Cached, Rereading)]
    assert written[0] == written[1]
    for i, row in enumerate(rows):
        alone = generate(
            Rereading(attached.model, attached), [prompts[i]], rows=[row], **{**how, "seeds": [0]}
        )
        assert alone[0][0] == written[0][i][0]


@torch.no_grad()
def test_the_average_starts_at_the_mean_and_routers_move_alone(tmp_path):
    many = filled(skills=3, heads=2, tasks=TASKS)
    many.save(tmp_path)
    one = put("mhr", skills=1, heads=2, r=3, target_modules=["q_proj", "down_proj"])
    one.load(one.read(tmp_path))
    for name, p in one.parameters().items():
        if name.endswith((".A", ".B")):
            assert torch.allclose(p[0], many.parameters()[name].mean(0), atol=1e-6)
    frozen = put("mhr", skills=3, heads=2, r=3, tasks=["new"], train="routers", target_modules=["q_proj"])
    moving = {slot for group in frozen.param_groups() for slot, p in group.params.items() if p.requires_grad}
    assert moving == {"Z"}
    again = put(
        "mhr", skills=3, heads=2, r=3, tasks=["n"], train="routers", target_modules=["q_proj", "down_proj"]
    )
    again.load(again.read(tmp_path))
    for name, p in again.parameters().items():
        assert name.endswith("Z") or torch.equal(p, many.parameters()[name])
    before = again.tensors()
    with torch.enable_grad():
        read(again, ["n", "n"]).mean().backward()
    assert all((p.grad is not None) == name.endswith("Z") for name, p in again.parameters().items())
    assert all(torch.equal(before[name], p) for name, p in again.parameters().items())


@pytest.mark.long
def test_many_tasks_need_more_than_one_adapter():
    """Six maps of the same inputs, of rank one each: one shared update of equal budget fits their mean."""
    ends = {}
    for skills in (1, 6):
        torch.manual_seed(0)
        tasks = [str(t) for t in range(6)]
        settings = {"skills": skills, "heads": 2, "r": 6 // skills, "tasks": tasks}
        method = build("tuner", {"name": "mhr", **settings})
        p = numbers(method.init(torch.zeros(8, 8)))
        targets = torch.randn(6, 8, 1) @ torch.randn(6, 1, 8)
        x = torch.randn(6, 32, 8)
        want = x @ targets.mT
        layer = torch.nn.Linear(8, 8, bias=False).eval()
        p.route = torch.arange(6)
        own = [p.A, p.B, p.Z]
        optimizer = torch.optim.Adam([{"params": own[:2], "lr": 0.05}, {"params": own[2:], "lr": 0.2}])
        for _ in range(100):
            loss = (method.forward(x, torch.zeros_like(want), p, layer) - want).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends[skills] = float(loss.detach())
    assert ends[6] < 0.5 * ends[1], ends
