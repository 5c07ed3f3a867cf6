"""trans_lora: what each run reads, and a tuner that moves to another model and another kind of tuner."""

from __future__ import annotations

import pytest

import luthier
from helpers.plans import played, report
from luthier.errors import RecipeError
from luthier.methods.plans.sequences.trans_lora import TransLoRA
from luthier.methods.stages.synthesize._synthesis import PolicySpeaker
from luthier.recipe.recipe import Recipe
from luthier.toy import rows

SOURCE = {"model": "toy:lm-small", "tuner": "lora"}


def test_three_runs_and_what_each_reads():
    recipe = Recipe.load({"model": "toy:lm", "tuner": "pfeiffer"})
    plan = {"name": "trans_lora", "source": SOURCE, "n": 9, "seeds": 3}
    (source, discriminator, target), last = played(plan, recipe, [report(f"run-{k}") for k in range(3)])
    assert source.model == discriminator.model == "toy:lm-small" and source.stages == []
    assert [stage["name"] for stage in discriminator.stages] == ["origin_rows"]
    assert (target.model, target.tuner) == (recipe.model, recipe.tuner)
    seeds, transfer = target.stages
    assert seeds == {"name": "random_rows", "n": 3}
    assert (transfer["source"], transfer["discriminator"]) == ("run-0", "run-1") and transfer["n"] == 9
    assert last.folder == "run-2"
    chain = {**plan, "source_run": "a", "discriminator_run": "b"}
    (target,), _ = played(chain, recipe, [report("run-0")])
    assert (target.stages[1]["source"], target.stages[1]["discriminator"]) == ("a", "b")
    (_, target), _ = played({**plan, "select": False}, recipe, [report(f"run-{k}") for k in range(2)])
    assert target.stages[1]["discriminator"] is None
    with pytest.raises(RecipeError, match="source cannot change data"):
        TransLoRA(source={"data": "x"})


ON = [row["prompt"] for row in rows("stream", "task_1", 3000, "written")]
OFF = [row["prompt"] for row in rows("sentiment", "train", 1000)]
OFF += [row["prompt"] for row in rows("stream", "domain_1", 1000)]


def mostly_off(self, prompts, how):
    """Seven in ten inputs are of other tasks."""
    out = []
    for h in how:
        place = h["seed"] // 10
        out.append(OFF[place % len(OFF)] if h["seed"] % 10 < 7 else ON[place % len(ON)])
    return out


@pytest.mark.slow
def test_a_tuner_moves_to_another_model_without_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(PolicySpeaker, "ask_all", mostly_off)
    recipe = {
        "model": "toy:lm-small",
        "data": {"path": "toy:stream/task_1", "n": 300},
        "eval_data": {"path": "toy:stream/task_1_test", "n": 150},
        "tuner": "full",
        "learning_rate": 3e-3,
        "max_steps": 80,
        "per_device_train_batch_size": 16,
        "evaluate": ["accuracy"],
        "save_steps": 1000,
    }
    source = {"model": "toy:lm", "tuner": "lora", "learning_rate": 1e-2, "max_steps": 120}
    plan = {"name": "trans_lora", "source": source, "n": 150, "max_new_tokens": 6}
    done = luthier.tune(recipe | {"plan": plan}, folder=tmp_path / "transfer")
    source, discriminator, _ = done.runs
    earlier = {"source_run": str(source), "select": False}
    every = luthier.tune(recipe | {"plan": {**plan, **earlier}}, folder=tmp_path / "all")
    name = next(name for name in done.after if "accuracy" in name)
    accuracy = luthier.Report.read(source).after[name]
    assert accuracy > 0.8 and done.before[name] < 0.5
    assert done.after[name] >= accuracy - 0.02
    assert done.after[name] > every.after[name] + 0.05
