"""Rewards of sampled answers to held-out prompts, which reinforcement learning and rejection sampling raise.

Greedy answers (evaluator `generate`) show how a model is used; a policy can gain in expectation while its
likeliest answers get worse, and the other way round.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator, keep
from luthier.methods.formats._base import BadRow
from luthier.registry import Metric, Range, build, evaluator


@evaluator(
    metrics=[
        Metric("sampled_reward", "mean reward (sampled)", better="higher", rank=6),
        Metric("solved", "prompts with a right sample", unit="%", better="higher"),
        Metric("mixed", "prompts with right and wrong samples", unit="%"),
    ],
    requires=[GENERATE],
    use_when="you train by rewards of samples: it measures the same on held-out prompts, and how many prompts"
    " can teach anything (those with right and with wrong samples).",
    costs="`samples` answers to each of `n` prompts, before and after.",
)
class Sampled(Evaluator):
    """`sampled_reward`: the mean over all answers; `solved`: share of prompts with an answer of 0.5 or more;
    `mixed`: share of prompts whose answers have unequal rewards.
    """

    reward: Any = "exact_match"  # the reward that scores the answers
    n: Annotated[int, Field(ge=1)] = 64  # prompts that are answered
    skip: Annotated[int, Field(ge=0)] = 0  # held-out prompts before these, such as those a plan selects on
    samples: Annotated[int, Field(ge=1), Range(2, 16)] = 4  # answers of each
    max_new_tokens: Annotated[int, Field(ge=1)] = 64  # tokens per answer
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature

    @property
    def active_requires(self):
        return self.requires | build("reward", self.reward).requires

    def run(self, roles, rows, folder, when):
        judge = build("reward", self.reward)
        answerable, prompts, seeds = [], [], []
        for row in rows[self.skip : self.skip + self.n]:
            try:
                prompts.append(roles.renderer.prompt(row))
            except BadRow:
                continue
            answerable.append(row)
            seeds.append(roles.clock.derive_seed("sampled", row["id"], at=0))
        if not prompts:
            return {}
        written = roles.policy.generate(
            prompts,
            rows=answerable,
            seeds=seeds,
            n=self.samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            stop=roles.renderer.stop_ids,
        )
        means, solved, mixed = {}, 0, 0
        for row, answers in zip(answerable, written, strict=True):
            scores = judge.scores(row, [roles.renderer.answer(ids) for ids in answers])
            means[str(row["id"])] = sum(scores) / len(scores)
            solved += max(scores) >= 0.5
            mixed += len(set(scores)) > 1
        keep(folder, when, sampled_reward=means)
        n = len(means)
        return {"sampled_reward": sum(means.values()) / n, "solved": solved / n, "mixed": mixed / n}
