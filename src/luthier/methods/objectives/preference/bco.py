"""Binary classifier optimization without pairs: trains the implicit reward to classify completions as good
(score above 0) or bad.

Rewards are shifted by the midpoint between the mean of the good and the mean of the bad ones, so that the
classifier need not learn an offset. Departs: the midpoint is computed on one micro-batch (the paper keeps a
running mean over steps, which would make a step depend on its history), and the density ratio for prompts of
different domains is left out.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.preference._pairs import Beta, Positive, log_ratios, logistic, one_sided
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective

SHIFTED = "the reward shift is the mean over one micro-batch"


@objective(
    paper="arXiv:2404.04656",
    requires=[COMPLETIONS, SCORES, REFERENCE, LOGPROBS],
    contract={"accumulation": SHIFTED},
    use_when="feedback is good or bad for single completions and you want the reward to be shifted so"
    " that both kinds are classified.",
    costs="a forward and backward pass over each completion.",
    starting_rate="that of `kto`.",
    rate_factor=0.05,
)
class BCO(Objective):
    """weight * -log s(r - shift) of a good completion, weight * -log s(shift - r) of a bad one, r = beta *
    log-ratio.
    """

    unit = "sequence"

    beta: Beta = 0.1  # strength of the regularisation towards the reference
    desirable_weight: Positive = 1.0  # weight of good completions
    undesirable_weight: Positive = 1.0  # weight of bad completions

    def row_warnings(self, rows):
        return one_sided(self.name, rows)

    def loss(self, roles, batch):
        reward = self.beta * batch.sums(log_ratios(roles, batch))
        good = batch.column("scores") > 0
        chosen, rejected = reward.detach()[good], reward.detach()[~good]
        shift = sum((side.mean() for side in (chosen, rejected) if len(side)), reward.new_zeros(())) / 2
        batch.note(**{"shift": shift, "rewards/chosen": chosen, "rewards/rejected": rejected})
        weight = torch.where(good, self.desirable_weight, self.undesirable_weight)
        return weight * logistic(torch.where(good, reward - shift, shift - reward))
