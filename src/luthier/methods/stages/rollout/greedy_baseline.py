"""Scores the policy's greedy answer to each prompt: the baseline of `remax`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.methods.stages.rollout.score import Score
from luthier.registry import Column, stage

BASELINE = Column(
    "baseline", says="the score of the greedy answer (stage greedy_baseline)", example=(0.5, -0.5)
)


@stage(
    paper="arXiv:2310.10505",
    row="remax",
    example={"max_new_tokens": 3},
    requires=[GENERATE],
    provides=[BASELINE],
    use_when="objective `remax` needs the reward of the greedy answer.",
    costs="one greedy answer to each prompt, and its reward.",
    covers="the greedy answer of the policy as it is at this step, scored by the same reward.",
    tests=[
        "methods/stages/rollout/test_advantages.py::test_the_greedy_baseline_is_the_score_of_the_greedy_answer"
    ],
)
class GreedyBaseline(Score):
    """Column `baseline`. Give it the rewards, weights and max_new_tokens of the stages `rollout` and
    `score`.
    """

    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of the greedy answer

    def __call__(self, rows, roles):
        rows = list(rows)
        # a place for an id: a row may be there twice
        prompts = [{**row, "id": str(place)} for place, row in enumerate(rows)]
        greedy = Rollout(n=1, temperature=0.0, max_new_tokens=self.max_new_tokens)
        answered = {}
        for row in super().__call__(greedy(prompts, roles), roles):
            answered[int(row["id"])] = row["scores"][0]
        for place, row in enumerate(rows):
            if place in answered:
                yield {**row, "baseline": answered[place]}
