"""Scores completions by further rewards, stored in addition to their scores, for `modpo`."""

from __future__ import annotations

from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import REWARDS, text_of
from luthier.methods.stages.rollout.score import Score
from luthier.registry import stage


@stage(
    former="judge",
    requires=[COMPLETIONS],
    provides=[REWARDS],
    use_when="completions have scores already and further goals are to be scored beside them, for `modpo`.",
    costs="one call of each reward for each completion.",
)
class ScoreWith(Score):
    """Column `rewards`, beside those already there: {name of the reward: a number for each completion}."""

    @property
    def active_provides(self):
        return self.provides  # of one reward, too

    def __call__(self, rows, roles):
        for row in rows:
            texts = [text_of(roles, c) for c in row["completions"]]
            each = {self.named(k): self.judged(judge, row, texts) for k, judge in enumerate(self.reward)}
            yield {**row, "rewards": {**row.get("rewards", {}), **each}}
