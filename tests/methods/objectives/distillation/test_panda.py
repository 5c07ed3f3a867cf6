"""PANDA: the term by hand, prompt tuning where nothing transfers, the embedding of a task, and the ranking of
sources by it.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import luthier
from helpers.objectives import batch_of, cast, full_logits, loss_of, make_rows, network
from luthier.errors import RecipeError
from luthier.methods.evaluators._trajectory import spearman
from luthier.methods.stages.curate.transferability import mean_state
from luthier.model.loaded import load
from luthier.model.policy import Policy
from luthier.registry import build
from luthier.storage.layout import STAGE_METRICS
from luthier.toy.tasks import stream, style

PROMPT = {"name": "prompt", "num_virtual_tokens": 8}
RECIPE = {"model": "toy:lm-small", "tuner": PROMPT, "learning_rate": 0.03, "seed": 1, "evaluate": ["loss"]}
RECIPE |= {"per_device_train_batch_size": 8, "num_train_epochs": 99}


def weighed(*weights: float) -> list[dict]:
    return [{**row, "transferability": w} for row, w in zip(make_rows(len(weights)), weights, strict=True)]


def test_the_term_by_hand_and_zero_for_the_same_prompt():
    roles, rows = cast(), weighed(0.0, 0.25, 1.0)
    batch = batch_of(rows)
    apart = (full_logits(roles, "policy", rows) - full_logits(roles, "teacher", rows)).square().mean(-1)
    weights = torch.tensor([0.0, 0.25, 1.0])[batch.group[batch.owner]]
    values = loss_of("panda", roles, rows)
    torch.testing.assert_close(values.detach(), weights * apart, atol=1e-5, rtol=1e-4)
    plain = loss_of({"name": "panda", "adaptive": False}, cast(), make_rows(3))
    torch.testing.assert_close(plain.detach(), apart, atol=1e-5, rtol=1e-4)
    values.sum().backward()
    assert all(p.grad is None for p in roles.teacher.model.parameters())
    for match in ("logits", "hidden"):
        equal = loss_of({"name": "panda", "match": match}, cast(teacher=network()), rows)
        torch.testing.assert_close(equal, torch.zeros_like(equal), atol=1e-10, rtol=0)


def test_the_embedding_is_the_mean_state():
    roles, rows = cast(), make_rows(5)
    caller = SimpleNamespace(teacher=roles.teacher, batch=batch_of)
    states = roles.teacher.outputs(batch_of(rows)).hidden
    assert torch.allclose(mean_state(caller, rows, batch_size=2), states.double().mean(0), atol=1e-6)


# --- whole runs


def goods(split: str, n: int) -> list[dict]:
    return [{k: row[k] for k in ("prompt", "completion")} for row in stream.rows(f"task_1{split}", n)]


def reworded(rows: list[dict]) -> list[dict]:
    """The same classes in other sentences."""
    words = {"the ": "neither ", " lies by ": " nor ", "here are a": "not only", "and a": "but a"}
    out = []
    for row in rows:
        prompt = row["prompt"]
        for own, other in words.items():
            prompt = prompt.replace(own, other)
        out.append({**row, "prompt": prompt})
    return out


def pirates(split: str, n: int) -> list[dict]:
    return [{k: row[k] for k in ("prompt", "completion")} for row in style.rows(f"new{split}", n)]


def tasks(split: str, n: int) -> dict[str, list[dict]]:
    """Two that share their labels, and one that has nothing of either."""
    both = goods(split, 2 * n)
    return {"goods": both[:n], "reworded": reworded(both[n:]), "pirates": pirates(split, n)}


def test_without_transferability_it_is_prompt_tuning(tmp_path):
    """A weight of 0 trains the same vectors bit for bit, and no run changes the prompt that teaches."""
    rows = goods("", 16)
    first = luthier.tune(
        {**RECIPE, "data": rows, "max_steps": 2, "evaluate": None}, folder=tmp_path / "source"
    )
    source = Path(first.folder) / "adapter_model.safetensors"
    before = source.read_bytes()
    roles = {"teacher": {"name": "model", "model": str(first.folder)}}
    saved = {}
    for name, weight, objective in (("plain", 0, "sft"), ("none", 0, "panda"), ("some", 0.5, "panda")):
        changes = {"data": [{**row, "transferability": weight} for row in reworded(rows)], "seed": 2}
        if objective == "panda":
            changes |= {"objective": "sft + 0.1*panda", "roles": roles}
        recipe = {**RECIPE, **changes, "max_steps": 3, "evaluate": None}
        report = luthier.tune(recipe, folder=tmp_path / name)
        saved[name] = load_file(Path(report.folder) / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(saved["plain"], saved["none"])
    assert not torch.equal(saved["plain"], saved["some"])
    assert source.read_bytes() == before


@pytest.mark.slow
def test_tasks_that_share_labels_transfer(tmp_path):
    """The cosine ranks six pairs as the loss on the target does when the source's prompt is put before it;
    and taught by the nearest source, a new prompt learns more in as many steps.
    """
    train, test = tasks("", 120), tasks("_test", 24)
    sources = {}
    for name, rows in train.items():
        recipe = {**RECIPE, "data": rows, "eval_data": test[name], "max_steps": 40}
        sources[name] = luthier.tune(recipe, folder=tmp_path / f"source-{name}")
    cosines, gains = {}, {}
    for source, target in itertools.permutations(train, 2):
        loaded = load(str(sources[source].folder)).roles
        loaded.players["teacher"] = Policy(
            loaded.policy.architecture, loaded.policy.model, loaded.policy.attached, "teacher"
        )
        stage = build("stage", {"name": "transferability", "source": train[source]})
        targets = [{"id": str(i), **row} for i, row in enumerate(train[target])]
        rows = [{**row, "completions": [row["completion"]]} for row in targets]
        cosines[source, target] = next(iter(stage(rows, loaded)))["transferability"]
        changes = {"objective": None, "init_from": str(sources[source].folder), "eval_data": test[target]}
        report = luthier.tune(
            {**RECIPE, **changes, "data": train[target][:8]}, folder=tmp_path / source / target
        )
        gains[source, target] = 1 - report.before["loss"] / sources[target].before["loss"]
    pairs = list(cosines)
    near = [("goods", "reworded"), ("reworded", "goods")]
    assert min(cosines[p] for p in near) > 0.2 + max(cosines[p] for p in pairs if p not in near), cosines
    ranked = [torch.tensor([values[p] for p in pairs]) for values in (cosines, gains)]
    correlation = spearman(*ranked)
    assert correlation is not None and correlation > 0.3, (cosines, gains)
    recipe = {**RECIPE, "data": train["reworded"][:32], "eval_data": test["reworded"], "max_steps": 12}
    plain = luthier.tune({**recipe, "seed": 2}, folder=tmp_path / "plain")
    changes = {
        "objective": "sft + 0.1*panda",
        "roles": {"teacher": {"name": "model", "model": str(sources["goods"].folder)}},
        "stages": [{"name": "transferability", "source": train["goods"]}],
    }
    taught = luthier.tune({**recipe, **changes, "seed": 2}, folder=tmp_path / "taught")
    assert taught.after["loss"] < plain.after["loss"] - 0.1
    measures = json.loads((Path(taught.folder) / STAGE_METRICS).read_text(encoding="utf-8"))
    assert measures["transferability"] > 0.8


def test_a_source_is_named():
    with pytest.raises(RecipeError, match="set source"):
        build("stage", "transferability")([], cast())
