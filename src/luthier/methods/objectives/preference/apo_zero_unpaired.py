"""APO-zero without pairs: raises the likelihood of good completions (score above 0) relative to the reference
and lowers that of bad ones.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.preference._pairs import Beta, Positive, log_ratios, one_sided
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2408.06266",
    requires=[COMPLETIONS, SCORES, REFERENCE, LOGPROBS],
    use_when="feedback is good or bad for single completions and good ones are better than the model's"
    " own; without pairs it needs no estimate of a reference point, unlike KTO.",
    costs="a forward and backward pass over each completion.",
    starting_rate="that of `kto`.",
    rate_factor=0.05,
)
class APOZeroUnpaired(Objective):
    """weight * (1 - s(r)) of a good completion, weight * s(r) of a bad one, r = beta * log-ratio."""

    unit = "sequence"

    beta: Beta = 0.1  # strength of the regularisation towards the reference
    desirable_weight: Positive = 1.0  # weight of good completions
    undesirable_weight: Positive = 1.0  # weight of bad completions

    def row_warnings(self, rows):
        return one_sided(self.name, rows)

    def loss(self, roles, batch):
        reward = self.beta * batch.sums(log_ratios(roles, batch))
        good = batch.column("scores") > 0
        batch.note(**{"rewards/chosen": reward[good], "rewards/rejected": reward[~good]})
        weight = torch.where(good, self.desirable_weight, self.undesirable_weight)
        return weight * torch.sigmoid(torch.where(good, -reward, reward))
