"""Several ways to select rows on the same rows, side by side: which rows each takes, and how much they agree.

The survey of data assessment sorts selectors by what they look at, quality, diversity or importance, and by
their rule (the best, a threshold, a draw, one after another). Here a selector is a list of stages, scores
first and then the rule, so that any score goes with any rule; each stands in a group. Of every pair the
Jaccard overlap of the rows is reported. All rows go on, each with the names of the selectors that take it, or
those that `keep` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from itertools import combinations
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.stages._base import Stage
from luthier.registry import build, requires_of, stage

GROUPS = ("quality", "diversity", "importance")


@stage(
    example={"selectors": {"quality": {"first": [{"name": "random_rows", "n": 3}]}}},
    paper="arXiv:2408.02085",
    row="data-selection-survey",
    use_when="several ways to select rows are thinkable, and you ask whether they choose the same ones.",
    costs="that of every selector.",
    covers="selectors in the survey's three groups, scores and rules combined freely, the overlap of what"
    " they choose.",
    omits="a group that each selecting stage declares by itself; the loss after training on each choice:"
    " `luthier compare` with the selectors as `stages`; the survey's table of published results.",
    tests=[
        "methods/stages/select/test_selector_overlap.py::test_overlaps_are_those_of_the_rows_that_are_taken",
        "methods/stages/select/test_selector_overlap.py::test_any_score_goes_with_any_rule",
    ],
)
class SelectorOverlap(Stage):
    """Column `selectors`: who takes a row."""

    # group (quality, diversity, importance) -> name -> stages, as in a recipe
    selectors: dict[str, dict[str, list[Any]]] = field(
        default_factory=lambda: {"quality": {"random": [{"name": "random_rows", "share": 0.5}]}}
    )
    keep: str | None = None  # the selector whose rows go on; null: all rows

    def __post_init__(self):
        other = sorted({*self.selectors} - {*GROUPS})
        if other:
            raise RecipeError(
                f"stage 'selector_overlap': {other[0]} is no group of selectors; they are {', '.join(GROUPS)}"
            )
        if self.keep is not None and self.keep not in self.stages():
            raise RecipeError(f"stage 'selector_overlap': keep: no selector is called {self.keep}")

    def stages(self) -> dict[str, list[Any]]:
        """Name of a selector -> its stages, built."""
        out = {}
        for some in self.selectors.values():
            for name, specs in some.items():
                out[name] = [build("stage", spec) for spec in specs]
        return out

    @property
    def active_requires(self):
        every = [requires_of(each) for stages in self.stages().values() for each in stages[:1]]
        return frozenset().union(self.requires, *every)

    def __call__(self, rows, roles):
        rows = list(rows)
        dropped = getattr(roles, "dropped", None)
        before = dict(dropped) if dropped is not None else {}
        choices = {name: self.choice(stages, rows, roles) for name, stages in self.stages().items()}
        if dropped is not None:  # what one of them leaves out is not out
            dropped.clear()
            dropped.update(before)
        values = {}
        for one, other in combinations(choices, 2):
            values[f"overlap {one}, {other}"] = jaccard(choices[one], choices[other])
        self.measure(roles, **values)
        groups = {name: group for group, some in self.selectors.items() for name in some}
        sizes = ", ".join(f"{name} ({groups[name]}) {len(ids)}" for name, ids in choices.items())
        listed = "; ".join(f"{name}: {value:.0%}" for name, value in values.items())
        self.warn(roles, f"rows of {len(rows)}: {sizes}" + (f"; {listed}" if listed else ""))
        out = []
        for row in rows:
            out.append({**row, "selectors": [name for name, ids in choices.items() if row["id"] in ids]})
        if self.keep is None:
            return out
        places = [place for place, row in enumerate(rows) if row["id"] in choices[self.keep]]
        return self.drop(roles, out, places, f"selector {self.keep} does not take them")

    def choice(self, stages: Sequence[Any], rows: list[dict], roles: Any) -> set[str]:
        """Ids of the rows that are left behind all stages."""
        some: Any = rows
        for each in stages:
            some = list(each(some, roles))
        return {row["id"] for row in some}


def jaccard(one: set[str], other: set[str]) -> float:
    """Of two sets; 1 where both are empty."""
    return len(one & other) / len(one | other) if one or other else 1.0
