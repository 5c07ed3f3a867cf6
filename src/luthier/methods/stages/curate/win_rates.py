"""Win rates of each completion against the others of its row, computed from scores.

A is preferred to B with probability sigmoid((score A - score B) / temperature), as in Bradley-Terry (and as
SPPO's paper uses PairRM); against itself with 1/2. For preferences that no score can express (cycles),
provide the column instead.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from luthier.methods.formats._base import SCORES
from luthier.methods.stages._base import Stage
from luthier.registry import Column, stage

WIN_RATES = Column("win_rates", per="completion", says="how often each completion wins against the others")


@stage(
    paper="arXiv:2405.00675",
    row="sppo",
    requires=[SCORES],
    use_when="completions have scores and objective `sppo` needs win rates.",
    costs="nothing beside reading the scores.",
)
class WinRates(Stage):
    """Column `win_rates`: the mean probability of being preferred over the row's completions, itself
    included.
    """

    asks_model = False

    temperature: Annotated[float, Field(gt=0)] = 1.0  # divides the difference of two scores

    def __call__(self, rows, roles):
        for row in rows:
            scores = [s / self.temperature for s in row["scores"]]
            yield {**row, "win_rates": [sum(preferred(a - b) for b in scores) / len(scores) for a in scores]}


def preferred(gap: float) -> float:
    """sigmoid(gap), whatever its size."""
    return 0.5 * (1 + math.tanh(gap / 2))
