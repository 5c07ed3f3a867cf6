"""TDPO, token-level DPO: corrects the margin by the token-wise KL of each side to the reference.

The KL is the forward KL(reference || policy), summed over a completion's tokens. `if_tdpo2: false` is the
paper's first form: both KLs at full weight and differentiated.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.distillation._distill import divergence
from luthier.methods.objectives.policy_gradient._policy_gradient import NotNegative
from luthier.methods.objectives.preference._pairs import Pairs, best_and_worst, log_ratios, logistic
from luthier.methods.roles._base import REFERENCE, REFERENCE_OUTPUTS
from luthier.registry import objective


@objective(
    paper="arXiv:2404.11999",
    requires=[PAIRS, REFERENCE, LOGPROBS, TOPK, REFERENCE_OUTPUTS],
    use_when="DPO drifts too far from the reference: each side's KL, token by token, corrects the margin.",
    costs="whole vocabularies of policy and reference are compared at each token.",
    rate_factor=0.05,
)
class TDPO(Pairs):
    """-log sigmoid(beta * (margin - alpha * (KL of the worst - KL of the best, not differentiated)))."""

    alpha: NotNegative = 0.5  # weight of the KLs; 0 is DPO; not used by the first form
    if_tdpo2: bool = True  # use the paper's second form

    def loss(self, roles, batch):
        def of(z, reference):
            return divergence(reference.log_softmax(-1), z.log_softmax(-1))

        kl = roles.policy.outputs(batch).apply(of, beside=[roles.reference.outputs(batch)])
        values, drift = batch.sums(log_ratios(roles, batch)), batch.sums(kl)
        best, worst = best_and_worst(batch)
        batch.note(kl=kl)
        self.note(batch, (values + drift).detach(), best, worst)
        chosen = drift[best].detach() if self.if_tdpo2 else drift[best]
        gap = (self.alpha if self.if_tdpo2 else 1.0) * (drift[worst] - chosen)
        margin = values[best] - values[worst] - gap
        return logistic(self.beta * torch.where(best != worst, margin, margin.detach()))
