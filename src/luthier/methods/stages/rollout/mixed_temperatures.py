"""Samples of each prompt at several temperatures: cool ones exploit what the policy knows, warm ones explore.

Iterative preference learning takes its pairs from such mixtures: a pair of best and worst teaches more where
the samples differ more (arXiv:2405.07863, section 3.3).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import CACHED_LOGPROBS, OLD_LOGPROBS, SAMPLES, TRUNCATED, Stage
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import Column, Range, stage

TEMPERATURES = Column("temperatures", per="completion", says="the temperature that a sample was drawn at")


@stage(
    example={"n": 2, "max_new_tokens": 3, "temperatures": [0.7, 1.0]},
    paper="arXiv:2405.07863",
    requires=[GENERATE],
    provides=[COMPLETIONS, SAMPLES, TRUNCATED, TEMPERATURES],
    removes=[PAIRS, SCORES, CACHED_LOGPROBS, OLD_LOGPROBS],
    use_when="samples at one temperature are too much alike to be ranked.",
    costs="as `rollout` with as many samples.",
)
class MixedTemperatures(Stage):
    """Columns `completions`, `truncated` and `temperatures`: n samples, as many of each temperature as can
    be.
    """

    n: Annotated[int, Field(ge=1), Range(2, 32, log=True)] = 8  # completions of each prompt in all
    temperatures: Annotated[tuple[float, ...], Field(min_length=1)] = (0.7, 1.0)  # of which the n are drawn
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a completion
    draw: int = 0  # number of the draw; another number gives other samples

    def __call__(self, rows, roles):
        rows, out = list(rows), []
        for place, temperature in enumerate(self.temperatures):
            share = len(range(place, self.n, len(self.temperatures)))
            if not share:
                continue
            # draws of other temperatures, and of other rounds, have seeds of their own
            draw = self.draw * len(self.temperatures) + place
            how = {"n": share, "max_new_tokens": self.max_new_tokens, "temperature": temperature}
            drawn = Rollout(**how, draw=draw)(rows, roles)
            columns = []
            for row in drawn:
                columns.append({**row, "temperatures": [temperature] * share})
            out = columns if not out else [joined(*pair) for pair in zip(out, columns, strict=True)]
        return out


def joined(row: dict, other: dict) -> dict:
    """A row with the completions of both."""
    columns = {name: row[name] + other[name] for name in ("completions", "truncated", "temperatures")}
    return {**row, **columns}
