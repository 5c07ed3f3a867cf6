"""CoFiTune's coarse search: which layers, and which of their matrices, to train for the best specialist that
keeps general skills.

The search descends a tree: quarters of the depth with all matrices, then attention or feed-forward in the
best quarter, then single kinds of matrices, then halves of the quarter. Each candidate is a run; the best of
a level is the root of the next, and the best of all is the plan's result. This takes seven to eleven runs,
where trying every range with every set would take dozens.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan, measured
from luthier.registry import plan

TREE: dict[tuple[str, ...], tuple[tuple[str, ...], ...]] = {  # a set of matrices -> what is tried within it
    ("qkv", "o", "up", "gate", "down"): (("qkv", "o"), ("up", "gate", "down")),
    ("qkv", "o"): (("qkv",), ("o",)),
    ("up", "gate", "down"): (("up", "down"),),
    ("up", "down"): (("down",),),
}


@plan(
    paper="arXiv:2404.10306",
    row="cofitune",
    use_when="you want to know which layers and matrices to train so that a specialist forgets little,"
    " and can afford about ten runs.",
    costs="seven to eleven runs.",
    covers="the search down the tree of layers and matrices.",
    tests=[
        "methods/tuners/subset/test_cofitune.py::test_cofitune_search_finds_the_planted_best",
    ],
)
class CoFiTune(Plan):
    """Search over tuner 'cofitune', its layer_range and modules, whatever tuner the recipe names."""

    scores: dict[str, float] = field(
        default_factory=lambda: {"accuracy": 1.0, "retention_accuracy": 1.0}
    )  # metric -> its weight in the sum
    soft_mask: bool = False  # whether candidates are tuned with the fine mask as well

    def __post_init__(self):
        if not self.scores:
            raise RecipeError("scores: list at least one metric")

    def recipes(self, recipe):
        tuner: Any = (
            recipe.tuner
            if isinstance(recipe.tuner, dict) and recipe.tuner.get("name") == "cofitune"
            else {"name": "cofitune"}
        )

        def candidate(where, modules):
            return recipe.but(
                tuner={
                    **tuner,
                    "layer_range": list(where),
                    "modules": list(modules),
                    "soft_mask": self.soft_mask,
                }
            )

        def score(report) -> float:
            return sum(weight * measured(report, metric) for metric, weight in self.scores.items())

        modules = next(iter(TREE))
        where, best = (0.0, 1.0), None
        level = [((q / 4, (q + 1) / 4), modules) for q in range(4)]
        halved = False
        while level:
            reports = yield [candidate(*node) for node in level]
            top = max(range(len(level)), key=lambda i: score(reports[i]))
            better = best is None or score(reports[top]) > score(best)
            if better:
                best, (where, modules) = reports[top], level[top]
            if better and modules in TREE:
                level = [(where, inner) for inner in TREE[modules]]
            elif not halved:
                middle, halved = (where[0] + where[1]) / 2, True
                level = [((where[0], middle), modules), ((middle, where[1]), modules)]
            else:
                level = []
        return best
