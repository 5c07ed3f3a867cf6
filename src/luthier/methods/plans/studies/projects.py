"""Compares several ways to specialise one model on several projects, every way on every project.

The study of personalised models for unit tests: full fine-tuning, embeddings and output, the last decoder
layer, a prefix. Each run starts at the base model. With `evaluate: [loss, cost]` the reports contain quality,
operations per row and storage per project; the run with the lowest loss is the plan's result.
"""

from __future__ import annotations

from typing import Any

from luthier.methods.plans._base import Plan, measured
from luthier.registry import plan

WAYS = ("full", {"name": "part", "part": "embeddings"}, {"name": "part", "part": "last_layer"}, "prompt")


@plan(
    row="personalized-unit-test-models",
    use_when="you choose how to specialise one model for several projects or customers.",
    costs="one run for each project and each way.",
    covers="every way on every project.",
    omits="BLEU, parse rate and overlap of identifiers.",
    tests=[
        "methods/plans/studies/test_projects.py::test_projects_compare_ways",
    ],
)
class Projects(Plan):
    """`of` names each project's rows; `ways` the tuners that are compared on each."""

    of: list[dict[str, Any]]  # changes to the recipe, one set per project: {data: ..., eval_data: ...}
    # tuners, or changes to the recipe with a tuner: {tuner: ..., learning_rate: ...}
    ways: tuple[Any, ...] = WAYS
    metric: str = "loss"  # selects the best run, lower is better

    def __post_init__(self):
        if not self.of or not self.ways:
            raise ValueError("projects needs at least one project (of) and one way (ways)")

    def recipes(self, recipe):
        changes = [w if isinstance(w, dict) and "tuner" in w else {"tuner": w} for w in self.ways]
        reports = yield [recipe.but(**project, **way) for project in self.of for way in changes]
        return min(reports, key=lambda r: measured(r, self.metric))
