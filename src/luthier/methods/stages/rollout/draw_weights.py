"""Draws how much each of several rewards counts, anew for each row and step, and writes it into the prompt:
one policy then learns every trade-off.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from luthier.methods.stages._base import Stage
from luthier.registry import Column, stage

WEIGHTS = Column("weights", says="how much each reward counts (stage draw_weights)", example=([0.5, 0.5],))


@stage(
    paper="arXiv:2210.12765",
    row="mo-gflownet",
    provides=[WEIGHTS],
    use_when="one policy is to serve every trade-off of several rewards: before `rollout`, with"
    " `scalarize` behind `score`.",
    costs="a line in the prompt.",
    covers="weights from a Dirichlet distribution, in words in the prompt.",
    tests=["methods/stages/rollout/test_weights.py::test_weights_are_drawn_and_written"],
)
class DrawWeights(Stage):
    """Columns `weights`, on the simplex, and `prompt`, which begins with them."""

    asks_model = False

    names: tuple[str, ...] = ("first", "second")  # names of the rewards, as they stand in the prompt
    alpha: Annotated[float, Field(gt=0)] = 1.0  # of the Dirichlet distribution: 1 is even over the simplex
    fixed: tuple[float, ...] | None = None  # these weights instead, at test time

    def __post_init__(self):
        if self.fixed is not None and len(self.fixed) != len(self.names):
            raise ValueError(f"fixed: {len(self.fixed)} weights for {len(self.names)} names")

    def __call__(self, rows, roles):
        for place, row in enumerate(rows):
            seed = roles.clock.derive_seed("draw_weights", row["id"], place)
            weights = self.fixed
            if weights is None:
                weights = np.random.default_rng(seed).dirichlet([self.alpha] * len(self.names)).tolist()
            pairs = zip(self.names, weights, strict=True)
            line = ", ".join(f"{name} {weight:.2f}" for name, weight in pairs) + "\n"
            prompt = row["prompt"]
            if isinstance(prompt, str):
                prompt = line + prompt
            else:
                prompt = [*prompt[:-1], {**prompt[-1], "content": line + prompt[-1]["content"]}]
            yield {**row, "prompt": prompt, "weights": list(weights)}
