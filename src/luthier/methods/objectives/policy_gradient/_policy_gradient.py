"""Policy gradients on sampled completions, with advantages relative to the other completions of the same row.

The importance ratio is taken against the policy that sampled (column `old_logprobs`, per token); without this
column the samples are on-policy and the ratio is 1. Log-probabilities are the model's own at temperature 1:
sample at temperature 1, or the ratio does not match the sampling distribution.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.objectives._base import Objective
from luthier.methods.roles._base import REFERENCE
from luthier.model.batch import Batch
from luthier.registry import Range, family

NotNegative = Annotated[float, Field(ge=0)]
KLWeight = Annotated[NotNegative, Range(1e-3, 0.1, log=True)]


def within_row(batch: Batch, scores: Tensor) -> Tensor:
    """[N] deviation (n - 1) of the scores of each sequence's row; 0 for a row of one."""
    centred = scores - batch.over_group(scores)
    n = batch.over_group(torch.ones_like(scores), "sum")
    return (batch.over_group(centred.square(), "sum") / (n - 1).clamp(min=1)).sqrt()


SPREAD = {  # scale_rewards -> what centred scores are divided by
    "group": lambda batch, scores: within_row(batch, scores) + 1e-4,
    "batch": lambda batch, scores: (scores.std() if len(scores) > 1 else scores.new_zeros(())) + 1e-4,
    "none": lambda batch, scores: 1.0,
}


@family
class PolicyGradient(Objective):
    """Family: `tokens` is the clipped surrogate of each token; a method defines the average over tokens."""

    costs: ClassVar[str] = "a forward and backward pass over every sampled completion."
    starting_rate: ClassVar[str] = "that of `grpo`."
    flat: ClassVar[bool] = True

    epsilon: Annotated[NotNegative, Range(0.05, 0.4)] = 0.2  # lower clip bound of the ratio: 1 - epsilon
    epsilon_high: NotNegative | None = None  # upper clip bound: 1 + epsilon_high; null: epsilon
    beta: KLWeight = 0.0  # weight of the KL to the reference; at 0 no reference is needed
    # divide advantages by the standard deviation in their row, in the micro-batch, or not at all
    scale_rewards: Literal["group", "batch", "none"] = "group"
    # weight the KL by the ratio, so that its gradient is that of the KL; false: as in GRPO's paper
    use_bias_correction_kl: bool = True

    @property
    def active_requires(self):
        return self.requires | {REFERENCE} if self.beta else self.requires - {REFERENCE}

    def advantages(self, batch: Batch) -> Tensor:
        """[N] how much better than its row a completion did."""
        scores = batch.column("scores")
        return (scores - batch.over_group(scores)) / SPREAD[self.scale_rewards](batch, scores)

    def tokens(self, roles: Any, batch: Batch) -> Tensor:
        """[T] -min(ratio * A, clipped ratio * A), plus beta times an estimate of KL(policy || reference).

        The estimate is Schulman's k3. Alone it has the right mean but the gradient of the KL the other way
        round; times the ratio (arXiv:2512.02556) it has both right.
        """
        logp, advantage = roles.policy.logprobs(batch), self.advantages(batch)[batch.owner]
        old = batch.per_token("old_logprobs") if "old_logprobs" in batch.rows[0] else logp.detach()
        low, high = 1 - self.epsilon, 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)
        ratio = (logp - old).exp()
        loss = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
        batch.note(clip_ratio=((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0)))
        if self.beta:
            gap = roles.reference.logprobs(batch) - logp
            kl = gap.exp() - gap - 1
            batch.note(kl=kl)
            loss = loss + self.beta * (ratio * kl if self.use_bias_correction_kl else kl)
        return loss
