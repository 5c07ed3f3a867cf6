"""Samples and scores prompts until there are enough whose samples differ in reward (DAPO's dynamic sampling).

Prompts that are answered all right or all wrong teach a group-relative objective nothing. They are skipped,
and the next prompts of the step take their place: a step draws more prompts than it trains on
(`per_device_train_batch_size`), and those that are not needed are not sampled.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import CACHED_LOGPROBS, OLD_LOGPROBS, SAMPLES, TRUNCATED, Stage
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.methods.stages.rollout.score import Score
from luthier.registry import Range, nested_list, stage


@stage(
    paper="arXiv:2503.14476",
    example={"n": 2, "max_new_tokens": 3, "reward": "length", "rows": 2, "least": -1.0},
    contract={
        "processes": "each process fills its own share, so which prompts are sampled depends on their number"
    },
    requires=[GENERATE],
    provides=[COMPLETIONS, SAMPLES, SCORES, TRUNCATED, OLD_LOGPROBS],
    removes=[PAIRS, CACHED_LOGPROBS],
    use_when="many prompts are answered all right or all wrong: in place of `rollout` and `score`, it samples"
    " until `rows` prompts teach something. `informative` drops such prompts once all are sampled.",
    costs="`n` samples of each prompt that is tried, at most of all prompts of the step.",
    covers="prompts without advantage are skipped and replaced until the step is full.",
    omits="prompts beyond the step's own: where they do not suffice the step has fewer rows.",
    tests=["methods/stages/rollout/test_reward_flow.py::test_prompts_without_advantage_are_replaced"],
)
class DynamicRollout(Stage):
    """Columns of `rollout` and of `score`, of the first `rows` prompts in each process whose scores differ by
    more than `least`.
    """

    reward: Annotated[tuple, nested_list("reward")] = ("exact_match",)  # the reward, or a list of them
    reward_weights: list[float] | None = None  # weight of each reward in `scores`; all 1 if not given
    rows: Annotated[int, Field(ge=1)] = 4  # prompts that a step trains on, in each process
    least: float = 0.0  # smallest difference of the best and the worst score, exclusive
    n: Annotated[int, Field(ge=2), Range(2, 32, log=True)] = 8  # completions of each prompt
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a completion
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    old: bool = False  # store the sampler's log-probability of each token
    sampler: str = "policy"  # role that samples

    @property
    def rollout(self) -> Rollout:
        """The stage that samples."""
        return Rollout(
            n=self.n,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            old=self.old,
            sampler=self.sampler,
        )

    @property
    def active_requires(self):
        return self.requires | self.rollout.active_requires

    @property
    def active_provides(self):
        return self.provides if self.old else self.provides - {OLD_LOGPROBS}

    def __call__(self, rows, roles):
        rows, informative, place = list(rows), [], 0
        score = Score(reward=self.reward, reward_weights=self.reward_weights)
        while place < len(rows) and len(informative) < self.rows:
            # as many as are missing: the next ones are only asked where these do not suffice
            some = rows[place : place + self.rows - len(informative)]
            place += len(some)
            for row in score(self.rollout(some, roles), roles):
                if max(row["scores"]) - min(row["scores"]) > self.least:
                    informative.append(row)
        if len(informative) < self.rows:
            self.warn(
                roles,
                f"only {len(informative)} of {len(rows)} prompts have completions of different scores;"
                " raise per_device_train_batch_size",
            )
        return informative
