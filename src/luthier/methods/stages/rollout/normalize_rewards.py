"""Rewards on one scale, whatever the scale of what gave them: less the mean of all rewards so far, over their
deviation, and clipped.

Advantages relative to a group do not change by the mean, but those of a critic do, and a penalty or a bonus
that is added later needs a scale to be measured against. A reward model's outliers are cut.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.roles.averages.reward_moments import REWARD_MOMENTS
from luthier.methods.stages._base import Stage
from luthier.registry import Range, stage


@stage(
    paper="arXiv:2307.04964",
    contract={"gives": "it needs role reward_moments, which the recipe names"},
    requires=[COMPLETIONS, SCORES, REWARD_MOMENTS],
    provides=[SCORES],
    removes=[PAIRS],
    use_when="a reward model's scores have a scale that is not known beforehand or outliers: behind `score`,"
    " before penalties and `advantages`.",
    costs="nothing.",
    covers="running mean and deviation over all processes, and clipping.",
    tests=["methods/stages/rollout/test_reward_flow.py::test_moments_are_those_of_all_rewards_so_far"],
)
class NormalizeRewards(Stage):
    """clip((score - mean) / deviation), the scores of this step counted in; `rewards` stay as they are."""

    center: bool = True  # subtract the mean; false: only the scale changes, and a reward of 0 stays 0
    # largest size of a normalised reward, in deviations; null: no limit
    clip: Annotated[float, Field(gt=0), Range(1.0, 10.0)] | None = 5.0

    def __call__(self, rows, roles):
        rows, moments = list(rows), roles.reward_moments
        every: list[float] = []
        for row in rows:
            every += row["scores"]
        moments.add(every)
        mean = float(moments.mean) if self.center else 0.0
        scale = moments.deviation or 1.0
        for row in rows:
            scores = [(score - mean) / scale for score in row["scores"]]
            if self.clip is not None:
                scores = [max(-self.clip, min(self.clip, score)) for score in scores]
            yield {**row, "scores": scores}
