"""Rows with given columns, and roles of a tiny model."""

from __future__ import annotations

from typing import Any

from helpers.rows import SUMS, example_value
from luthier.data.load import load_rows as load
from luthier.model.load import assemble
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import validate
from luthier.registry import build, declared_words


def rows_with(columns: set[str], n: int = 6) -> list[dict]:
    """Rows with an id, a prompt and exactly these columns."""
    answers = [
        [f"{a}", "no", "maybe not"] if columns & {"scores", "pairs"} else [f"{a} is it"] for a in range(n)
    ]
    if "contexts" in columns:
        answers = [["yes", "no"] for _ in range(n)]
    wanted = columns | ({"completions", "scores"} if "pairs" in columns else set())
    rows = []
    for a in range(n):
        row = {"id": f"r{a}", "prompt": f"what is {a}?"}
        if "steps" in wanted:
            row["step_labels"] = [True, False]
        if "completions" in wanted:
            row["completions"] = answers[a]
        if "scores" in wanted:
            row["scores"] = [0.5, 0.25, -1.0]
        for name in sorted(wanted - {"completions", "scores", "pairs"}):
            row[name] = example_value(declared_words("Column")[name], row, a)
        rows.append(row)
    return rows


def rollout(**settings):
    return build("stage", {"name": "rollout", "n": 3, "max_new_tokens": 8, **settings})


def make_roles(folder: str, tuner: Any = "full"):
    """Roles of a tiny model with itself, untuned, as the reference."""
    recipe = Recipe.load({"model": folder, "tuner": tuner, "dtype": "float32"})
    roles = assemble(recipe, validate(recipe, load(SUMS).rows))
    roles.reference, roles.judge = roles.policy.as_role("reference"), roles.policy.as_role("judge")
    return roles
