"""One run after another; each starts from the adapter of the last.

A run is a set of changes to the recipe. A run with only `init_from` and `evaluate` trains nothing:
`{init_from: {merge: average, of: all}, evaluate: [loss]}` merges the runs before it. `run:0`, anywhere in a
run, is the folder of the first run: `{name: reward_model, model: run:0}` scores by the reward model that it
trained.
"""

from __future__ import annotations

import re
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan
from luthier.recipe.recipe import key_of
from luthier.registry import plan

EARLIER = re.compile(r"run:(\d+)")  # the folder of an earlier run
MEASURES_ONLY = {"init_from", "evaluate", "eval_data"}


@plan(
    former_settings={"acts": "runs"},
    use_when="tuning has several steps, such as SFT and then DPO, or tasks after one another.",
    costs="the sum of its runs.",
)
class Sequence(Plan):
    """`plan: [{...}, {...}]` is short for it. `init_from: null` starts a run at the base model again."""

    runs: list[dict[str, Any]]  # changes to the recipe, one set per run

    def __post_init__(self):
        if not self.runs:
            raise ValueError("a plan needs at least one run")

    def recipes(self, recipe):
        folders, last, before = [], recipe.init_from, None
        for number, run in enumerate(self.runs):
            changes = {key_of(key): with_folders(value, folders) for key, value in run.items()}
            init_from = changes.get("init_from", last)
            if isinstance(init_from, dict) and init_from.get("of") == "all":
                if not folders:
                    raise RecipeError(f"run {number} merges all earlier runs, but there are none")
                init_from = {**init_from, "of": list(folders)}
            changed = recipe.but(**{**changes, "init_from": init_from})
            if changes and changes.keys() <= MEASURES_ONLY:
                changed = changed.but(objective=None)
            now = (changed.model, changed.methods()["tuner"])
            if "init_from" not in changes and before not in (None, now):
                what = "model" if now[0] != before[0] else "tuner"
                raise RecipeError(
                    f"run {number} has another {what} than the run before it and cannot"
                    " continue from its tensors; add `init_from: null` to start from the base"
                    " model"
                )
            report = yield changed
            folders.append(report.folder)
            last, before = report.folder, now


def with_folders(value: Any, folders: list[str]) -> Any:
    """A value in which every `run:N` is the folder of the N-th run. Raises RecipeError where that is no run
    before this one.
    """
    if isinstance(value, dict):
        return {key: with_folders(inner, folders) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_folders(inner, folders) for inner in value]
    match = EARLIER.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    number = int(match[1])
    if number >= len(folders):
        raise RecipeError(f"'{value}' in run {len(folders)} of the plan: only runs before it can be named")
    return folders[number]
