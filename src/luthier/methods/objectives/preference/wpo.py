"""WPO: weights pairs by how likely they are under the policy, so that off-policy pairs act like on-policy
ones.

A token's likelihood is normalised by its expected value under the policy (the paper's aligned weights, as in
TRL).
"""

import torch

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import best_and_worst
from luthier.methods.objectives.preference.dpo import DPO
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2406.11827",
    requires=[PAIRS, REFERENCE, LOGPROBS, TOPK],
    use_when="pairs come from another model than the policy: pairs that the policy itself would write"
    " get more weight.",
    rate_factor=0.05,
)
class WPO(DPO):
    """w_chosen * w_rejected * DPO, w = exp(mean over tokens of log p - log sum_v p(v)^2), not
    differentiated.
    """

    def loss(self, roles, batch):
        best, worst = best_and_worst(batch)
        outputs = roles.policy.outputs(batch)
        logprobs = outputs.logprobs.detach()
        with torch.no_grad():
            usual = outputs.apply(lambda z: (2 * z.log_softmax(-1)).logsumexp(-1))
            weight = batch.means(logprobs - usual).exp()
        return super().loss(roles, batch) * weight[best] * weight[worst]
