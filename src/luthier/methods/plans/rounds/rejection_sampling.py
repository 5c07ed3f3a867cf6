"""Rejection sampling, or best-of-n distillation: samples, keeps what a reward accepts, trains on it by sft.

With `most: 1` and no `least` a prompt's best sample is learned: the policy moves towards its own best-of-n,
whose KL to it is at most log n - (n - 1) / n (best-of-n distillation). With `least` and several answers a
prompt it is rejection fine-tuning as of verified solutions. Unlike `raft`, several answers are kept.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.plans.rounds._rounds import Rounds
from luthier.registry import Range, plan


@plan(
    paper="arXiv:2308.01825",
    former="best_of_n_distillation rejection_sampling_fine_tuning",
    use_when="answers can be verified or scored, and what best-of-n gains at inference is to be learned once"
    " (rejection sampling of TRL and OpenRLHF; best-of-n distillation).",
    costs="`rounds` times sampling `n` answers, scoring them and a supervised run.",
)
class RejectionSampling(Rounds):
    """`rounds` times rollout, score, accept and the recipe's objective (sft)."""

    rounds: Annotated[int, Field(ge=1), Range(1, 4)] = 1  # maximum number of rounds
    least: float | None = None  # smallest score that is accepted; null: any
    most: Annotated[int, Field(ge=1)] | None = 1  # answers of a prompt at most; null: all that are accepted

    def select(self, number):
        return [{"name": "accept", "least": self.least, "most": self.most}]
