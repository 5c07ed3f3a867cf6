"""One score of several rewards, by the weights of the row: their sum, their product, or the worst of them."""

from __future__ import annotations

import math
from typing import Literal

from luthier.errors import RecipeError
from luthier.methods.formats._base import PAIRS, SCORES
from luthier.methods.stages._base import REWARDS, Stage
from luthier.methods.stages.rollout.draw_weights import WEIGHTS
from luthier.registry import stage


@stage(
    example={"names": ["other", "other"]},
    paper="arXiv:2210.12765",
    row="mo-gflownet",
    requires=[REWARDS, WEIGHTS],
    provides=[SCORES],
    removes=[PAIRS],
    use_when="rows have several rewards and weights of their own (stage `draw_weights`).",
    costs="nothing.",
    covers="linear, product and Tchebycheff scalarisations.",
    tests=["methods/stages/rollout/test_weights.py::test_scalarisations_by_hand"],
)
class Scalarize(Stage):
    """linear: sum of w r. product: product of r^w. tchebycheff: 1 - the largest w (1 - r), for rewards up
    to 1.
    """

    asks_model = False

    names: tuple[str, ...] = ("first", "second")  # names of the rewards in the column `rewards`, as drawn
    form: Literal["linear", "product", "tchebycheff"] = "linear"  # how they become one

    def __call__(self, rows, roles):
        for row in rows:
            weights = row["weights"]
            if len(weights) != len(self.names):
                raise RecipeError(
                    f"stage 'scalarize': row {row['id']} has {len(weights)} weights for {len(self.names)}"
                    " rewards"
                )
            columns = [row["rewards"][name] for name in self.names]
            scores = [self.one(weights, rewards) for rewards in zip(*columns, strict=True)]
            yield {**row, "scores": scores}

    def one(self, weights: list[float], rewards: tuple[float, ...]) -> float:
        """The score of a completion."""
        pairs = list(zip(weights, rewards, strict=True))
        if self.form == "linear":
            return sum(w * r for w, r in pairs)
        if self.form == "product":
            return math.prod(max(r, 0.0) ** w for w, r in pairs)
        return 1 - max(w * (1 - r) for w, r in pairs)
