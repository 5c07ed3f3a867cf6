"""Noise contrastive alignment on pairs: rewards are absolute, so the chosen completion does not lose
likelihood to increase the margin.

The paper's form for K rated completions is left out.
"""

import torch.nn.functional as F

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2402.05369",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="DPO lowers the likelihood of chosen answers and you want absolute rewards that prevent it.",
    rate_factor=0.05,
)
class NCA(Pairs):
    """-log s(r_chosen) - log s(-r_chosen) / 2 - log s(-r_rejected) / 2, r = beta * log-ratio."""

    def pair(self, better, worse):
        chosen, rejected = self.beta * better, self.beta * worse
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
