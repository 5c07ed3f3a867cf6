"""spin: asks for dpo against each rounds own start; begins each round at log two; learning to prefer what is
said anyway changes nothing.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import luthier
from helpers.plans import played, report
from helpers.rows import SUMS
from luthier.data.load import load_rows as load
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.storage import files


def test_spin_asks_for_dpo_against_each_rounds_own_start(recipe):
    asked, _ = played(
        {"name": "spin", "rounds": 3, "beta": [0.1, 0.1, 5.0]}, recipe, [report(f"r{k}") for k in range(3)]
    )
    assert [r.init_from for r in asked] == [None, "r0", "r1"] and [
        r.stages[-1]["earlier"] for r in asked
    ] == [
        None,
        "r0",
        "r1",
    ]
    assert [r.objective["beta"] for r in asked] == [0.1, 0.1, 5.0] and all(
        r.roles["reference"] == "initial" for r in asked
    )
    with pytest.raises(RecipeError, match="beta: 1 values for 3 rounds"):
        build("plan", {"name": "spin", "beta": [0.1]})


@pytest.mark.long
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_spin_begins_each_round_at_log_two(base, tmp_path, tuner):
    plan = {"name": "spin", "rounds": 2, "max_new_tokens": 4}
    change = {"tuner": tuner, "plan": plan, "data": SUMS[:12], "max_steps": 6, "learning_rate": 5e-4}
    done = luthier.tune(base | change, folder=tmp_path)
    rounds = [luthier.Report.read(a) for a in done.runs]
    assert all(
        r.losses[0] == pytest.approx(math.log(2), abs=1e-5) and min(r.losses) < r.losses[0] - 1e-3
        for r in rounds
    )
    first, second = (files.read_rows(Path(r.folder) / "rows.jsonl") for r in rounds)
    assert len(first) == 12 and len(second) == 24
    assert [r["completions"] for r in second[12:]] == [r["completions"] for r in first]
    assert any(a["completions"] != b["completions"] for a, b in zip(first, second, strict=False))


def test_learning_to_prefer_what_is_said_anyway_changes_nothing(base, tmp_path):
    """Given and own answer are the same: the loss is log 2 and no weight moves."""
    from luthier.model.load import assemble
    from luthier.recipe.validate import validate

    made = Recipe.load({k: v for k, v in base.items() if k != "data"} | {"objective": "dpo"})
    roles = assemble(made, validate(made, load([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}]).rows))
    roles.players["reference"] = roles.policy.as_role("reference")
    ids = roles.renderer.encode({"id": 0, "prompt": "1+1=", "completions": ["2"]}).completions[0]
    row = {"id": 0, "prompt": "1+1=", "completions": ["2", ids], "scores": [1.0, 0.0]}
    loss = build("objective", "dpo").loss(roles, roles.batch([row]))
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-6 for p in roles.tuner.parameters().values())
