"""LD-DPO, length-desensitised: tokens beyond the length that both completions share have less weight.

ld_alpha 1 is DPO; 0 uses the shared length only.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Probability, best_and_worst, log_ratios
from luthier.methods.objectives.preference.dpo import DPO
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2409.06411",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="DPO makes answers longer: tokens beyond the common length of both sides get less weight.",
    rate_factor=0.05,
)
class LDDPO(DPO):
    """DPO on log-ratios in which tokens past the shorter side's length are weighted by ld_alpha."""

    ld_alpha: Probability = 0.5  # weight of the tokens past the shorter side's length

    def values(self, roles, batch):
        common = torch.minimum(*(batch.lengths[side] for side in best_and_worst(batch)))[batch.group]  # [N]
        ratios = log_ratios(roles, batch)
        return batch.sums(torch.where(batch.place < common[batch.owner], ratios, self.ld_alpha * ratios))
