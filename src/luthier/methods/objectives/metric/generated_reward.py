"""A reward as the loss: the model answers greedily, a reward scores the answer, and the loss is minus the
score.

It has no gradient, so it is for estimators that compare values of the loss (`mezo`): any reward may be one,
exact match and F1 among them. Each value costs an answer to every row of the batch. Departs from policy
gradients in that the greedy answer is scored and nothing is sampled; see objective `grpo` for these.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.estimators._base import FORWARD_ONLY
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.model.batch import Batch
from luthier.registry import build, objective


@objective(
    requires=[COMPLETIONS, GENERATE, FORWARD_ONLY],
    paper="arXiv:2305.17333",
    row="mezo",
    use_when="written answers are scored by a rule, and you use `mezo`.",
    costs="a greedy answer to each row, twice for each of the estimator's directions.",
    starting_rate="that of `mezo`, with a larger `eps`.",
    covers="the loss is minus the score of the greedy answer.",
    tests=[
        "methods/objectives/metric/test_metric.py::test_a_reward_is_that_of_the_greedy_answer",
    ],
)
class GeneratedReward(Objective):
    """Minus the reward of each row's greedy answer."""

    unit = "group"

    reward: Any = "exact_match"  # the reward that scores the answers, e.g. f1
    max_new_tokens: Annotated[int, Field(ge=1)] = 32  # maximum tokens of an answer

    def __post_init__(self):
        build("reward", self.reward)

    @property
    def active_requires(self):
        return self.requires | build("reward", self.reward).requires

    def loss(self, roles, batch):
        judge, clock = build("reward", self.reward), roles.clock
        written = roles.policy.generate(
            prompts_of(batch),
            seeds=[clock.derive_seed("generated_reward", row["id"], at=0) for row in batch.rows],
            max_new_tokens=self.max_new_tokens,
            temperature=0.0,
            stop=list(roles.renderer.stop_ids),
        )
        losses = []
        for row, (ids,) in zip(batch.rows, written, strict=True):
            losses.append(-float(judge.scores(row, [roles.renderer.answer(ids)])[0]))
        return torch.tensor(losses, dtype=torch.float32, device=batch.ids.device)


def prompts_of(batch: Batch) -> list[list[int]]:
    """[G] the tokens before the first completion of each row."""
    pieces, parents = batch.segments(), batch.parent.tolist()
    prompts: list[list[int]] = [[] for _ in batch.rows]
    for segment, row in zip(reversed(batch.completion.tolist()), reversed(batch.group.tolist()), strict=True):
        prompt: list[int] = []
        above = parents[segment]
        while above >= 0:
            prompt = batch.ids[pieces[above]].tolist() + prompt
            above = parents[above]
        prompts[row] = prompt
    return prompts
