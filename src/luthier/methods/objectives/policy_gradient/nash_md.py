"""Nash-MD: the policy learns to be preferred to a mixture of itself and the reference, and approaches the
policy that no other one beats.

The stage `opponent` with `by: mixture` samples from that mixture, a reward scores both, and the difference
of two scores is the logit of a preference. A policy gradient, with the KL to the reference as part of the
reward.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import SCORES
from luthier.methods.objectives.policy_gradient._policy_gradient import (
    KLWeight,
    PolicyGradient,
    sampled_logprobs,
)
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages._base import SAMPLES
from luthier.methods.stages.rollout.opponent import OPPONENT
from luthier.registry import objective


@objective(
    paper="arXiv:2312.00886",
    requires=[SAMPLES, SCORES, OPPONENT, REFERENCE, LOGPROBS],
    use_when="preferences are not the order of any score (they go in circles), and the answer that no"
    " other one beats is wanted.",
    costs="a forward and backward pass over every sample, and the samples of the mixture.",
    rate_factor=0.05,
)
class NashMD(PolicyGradient):
    """Of each of the policy's samples: -(probability of winning - 1/2 - beta * KL to go) * log p."""

    unit = "sequence"

    beta: KLWeight = 0.1  # weight of the KL to the reference; at 0 no reference is needed

    def advantages(self, roles, batch):
        scores, opponent = batch.column("scores"), batch.column("opponent").bool()
        # [N, N] who wins against whom, and whom each is compared with: the opponents of its row
        wins = torch.sigmoid(scores[:, None] - scores)
        against = (batch.group[:, None] == batch.group) & opponent
        rate = (wins * against).sum(1) / against.sum(1).clamp(min=1)
        batch.note(win_rate=rate[~opponent])
        advantage = (rate - 0.5)[batch.owner]
        if self.beta:
            gap = sampled_logprobs(batch, roles.policy.logprobs(batch)).detach()
            gap = gap - roles.reference.logprobs(batch)
            batch.note(kl=gap[~opponent[batch.owner]])
            advantage = advantage - self.beta * batch.suffix(gap)
        return torch.where(opponent[batch.owner], 0.0, advantage)

    def surrogate(self, batch, logp, ratio, advantage):
        return -advantage * logp

    def loss(self, roles, batch):
        return batch.sums(self.tokens(roles, batch))

    def divisor(self, batch):
        return float((~batch.column("opponent").bool()).sum())
