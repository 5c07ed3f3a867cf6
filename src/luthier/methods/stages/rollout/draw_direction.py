"""Draws a direction in the space of rewards for each row, and writes it into the prompt: one policy then
serves every user, whose preference is the direction.

A direction is a unit vector whose angle to the first reward's axis is uniform up to `degrees`. It stands in
front of the prompt in hundredths, as in `weighted rating = helpfulness*88 + verbosity*-47`; stage `scalarize`
makes one score of several rewards by it.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from luthier.methods.stages._base import Stage
from luthier.methods.stages.rollout.draw_weights import WEIGHTS
from luthier.registry import Range, stage


@stage(
    paper="arXiv:2402.18571",
    row="dpa",
    provides=[WEIGHTS],
    use_when="users differ in what they want of several rewards, and may also want less of one: before"
    " `rollout`, with `scalarize` behind `score`.",
    costs="a line in the prompt.",
    covers="directions around the first reward's axis, as arithmetic in the prompt; any of them at test"
    " time.",
    tests=["methods/plans/rounds/test_dpa.py::test_directions_have_length_one_and_stand_in_the_prompt"],
)
class DrawDirection(Stage):
    """Columns `weights`, of length one, and `prompt`, in front of which it stands (a system turn, if there
    are turns).
    """

    asks_model = False

    names: Annotated[tuple[str, ...], Field(min_length=2)] = ("first", "second")  # of the rewards, in order
    degrees: Annotated[float, Field(ge=0, le=180), Range(15, 90)] = 45.0  # largest angle to the first axis
    direction: tuple[float, ...] | None = None  # this direction instead, at test time
    draw: int = 0  # number of the draw; another number gives other directions

    def __post_init__(self):
        if self.direction is not None and len(self.direction) != len(self.names):
            raise ValueError(f"direction: {len(self.direction)} numbers for {len(self.names)} names")
        if self.direction is not None and not any(self.direction):
            raise ValueError("direction: all of its numbers are 0")

    def __call__(self, rows, roles):
        for place, row in enumerate(rows):
            seed = roles.clock.derive_seed("draw_direction", self.draw, row["id"], place)
            weights = self.vector(np.random.default_rng(seed))
            yield {**row, "prompt": directed(row["prompt"], self.names, weights), "weights": weights}

    def vector(self, rng: np.random.Generator) -> list[float]:
        """A unit vector."""
        if self.direction is not None:
            length = math.hypot(*self.direction)
            return [component / length for component in self.direction]
        angle = math.radians(rng.uniform(0.0, self.degrees))
        aside = rng.normal(size=len(self.names) - 1)
        aside = math.sin(angle) * aside / np.linalg.norm(aside)
        return [math.cos(angle), *aside.tolist()]


def directed(prompt: Any, names: tuple[str, ...], weights: list[float]) -> Any:
    """A prompt behind the direction that its answer is to follow."""
    parts = [f"{name}*{round(100 * weight)}" for name, weight in zip(names, weights, strict=True)]
    line = f"Maximize weighted rating = {' + '.join(parts)}"
    if isinstance(prompt, str):
        return f"{line}\n{prompt}"
    if isinstance(prompt[0], dict) and prompt[0].get("role") == "system":
        return [{**prompt[0], "content": f"{prompt[0]['content']}\n{line}"}, *prompt[1:]]
    return [{"role": "system", "content": line}, *prompt]
