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
from luthier.methods.stages._base import TRUNCATED
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
    """Family: `tokens` is the surrogate of each token; a method defines the average over tokens."""

    costs: ClassVar[str] = "a forward and backward pass over every sampled completion."
    starting_rate: ClassVar[str] = "that of `grpo`."
    flat: ClassVar[bool] = True

    beta: ClassVar[float] = 0.0  # a setting where a method weighs the KL to the reference by it

    # leave completions that reached no stop token out of the loss; their rewards still count in their group
    mask_truncated_completions: bool = False

    @property
    def active_requires(self):
        required = self.requires | {REFERENCE} if self.beta else self.requires - {REFERENCE}
        return required | {TRUNCATED} if self.mask_truncated_completions else required

    def advantages(self, roles: Any, batch: Batch) -> Tensor:
        """[T] how much better a token did than was to be expected, without gradient."""
        raise NotImplementedError

    def log_ratio(self, batch: Batch, change: Tensor) -> Tensor:
        """[T] logarithm of the importance weight of each token. change: [T] its log-probability now less that
        of the policy that sampled.
        """
        return change

    def surrogate(self, batch: Batch, logp: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
        """[T] what is minimised in place of minus the expected reward, from [T] each."""
        raise NotImplementedError

    def tokens(self, roles: Any, batch: Batch) -> Tensor:
        """[T] the surrogate of each token, 0 in masked completions.

        Notes `entropy`: minus the sampler's mean log-probability of what it sampled, which costs nothing and
        has the entropy as its expectation where sampling is at temperature 1.
        """
        logp = roles.policy.logprobs(batch)
        old = sampled_logprobs(batch, logp)
        batch.note(entropy=-old)
        ratio = self.log_ratio(batch, logp - old).exp()
        loss = self.surrogate(batch, logp, ratio, self.advantages(roles, batch))
        loss = loss + self.penalty(roles, batch, logp, ratio)
        if self.mask_truncated_completions:
            loss = torch.where(batch.column("truncated").bool()[batch.owner], 0.0, loss)
        return loss

    def penalty(self, roles: Any, batch: Batch, logp: Tensor, ratio: Tensor) -> Tensor | float:
        """[T] what is added for leaving the reference."""
        return 0.0

    def divisor(self, batch: Batch) -> float:
        if self.unit != "token" or not self.mask_truncated_completions:
            return self.count(batch)
        return float((~batch.column("truncated").bool()[batch.owner]).sum())


def sampled_logprobs(batch: Batch, logp: Tensor) -> Tensor:
    """[T] log-probabilities of the policy that sampled: the column `old_logprobs`, without it the policy's
    own.
    """
    return batch.per_token("old_logprobs") if "old_logprobs" in batch.rows[0] else logp.detach()


@family
class Clipped(PolicyGradient):
    """Family: PPO's clipped ratio."""

    epsilon: Annotated[NotNegative, Range(0.05, 0.4)] = 0.2  # lower clip bound of the ratio: 1 - epsilon
    epsilon_high: NotNegative | None = None  # upper clip bound: 1 + epsilon_high; null: epsilon

    def surrogate(self, batch, logp, ratio, advantage):
        """-min(ratio * A, clipped ratio * A)."""
        low, high = 1 - self.epsilon, 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)
        batch.note(clip_ratio=((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0)))
        return -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)


@family
class GroupRelative(PolicyGradient):
    """Family: advantages relative to the other completions of the row, and a KL to the reference in the
    loss.
    """

    beta: KLWeight = 0.0  # weight of the KL to the reference; at 0 no reference is needed
    # divide advantages by the standard deviation in their row, in the micro-batch, or not at all
    scale_rewards: Literal["group", "batch", "none"] = "group"
    # weight the KL by the ratio, so that its gradient is that of the KL; false: as in GRPO's paper
    use_bias_correction_kl: bool = True

    def advantages(self, roles, batch):
        scores = batch.column("scores")
        centred = scores - batch.over_group(scores)
        return (centred / SPREAD[self.scale_rewards](batch, scores))[batch.owner]

    def penalty(self, roles, batch, logp, ratio):
        """beta times Schulman's k3, an estimate of KL(policy || reference).

        Alone it has the right mean but the gradient of the KL the other way round; times the ratio
        (arXiv:2512.02556) it has both right.
        """
        if not self.beta:
            return 0.0
        gap = roles.reference.logprobs(batch) - logp
        kl = gap.exp() - gap - 1
        batch.note(kl=kl)
        return self.beta * (ratio * kl if self.use_bias_correction_kl else kl)


@family
class GroupClipped(GroupRelative, Clipped):
    """Family: GRPO's surrogate."""
