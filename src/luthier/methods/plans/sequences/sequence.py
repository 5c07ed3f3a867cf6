"""One act after another; each goes on from the last.

An act is a list of changes to the recipe around it. One that only says where to start and what to measure
trains nothing: `{start: {merge: average, of: all}, evaluate: [loss]}` merges the acts before it.
"""

from __future__ import annotations

from typing import Any

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan
from luthier.recipe.recipe import ALIASES
from luthier.registry import plan

ONLY_LOOKS = {"start", "evaluate", "eval_data"}


@plan()
class Sequence(Plan):
    """`plan: [{...}, {...}]` is short for it. `start: null` begins an act at the base model again."""

    acts: list[dict[str, Any]]  # changes to the recipe, one set an act

    def __post_init__(self):
        if not self.acts:
            raise ValueError("a plan needs at least one act")

    def recipes(self, recipe):
        folders, last, before = [], recipe.start, None
        for number, act in enumerate(self.acts):
            named = {ALIASES.get(key, key) for key in act}
            start = act.get("start", last)
            if isinstance(start, dict) and start.get("of") == "all":
                if not folders:
                    raise RecipeError(f"act {number} merges all acts before it, and there is none")
                start = {**start, "of": list(folders)}
            changed = recipe.but(**{**act, "start": start})
            if act and named <= ONLY_LOOKS:
                changed = changed.but(objective=None)
            now = (changed.model, changed.methods()["tuner"])
            if "start" not in act and before not in (None, now):
                what = "model" if now[0] != before[0] else "tuner"
                raise RecipeError(
                    f"act {number} has another {what} than the act before it, so it cannot go on from that"
                    " act's tensors: add `start: null` to begin at the base model"
                )
            report = yield changed
            folders.append(report.folder)
            last, before = report.folder, now
