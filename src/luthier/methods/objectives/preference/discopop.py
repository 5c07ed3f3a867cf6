"""DiscoPOP: a loss discovered by a language model, logistic for small margins and exponential for large ones.

The exponential part grows without bound for negative margins: keep beta small.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs, Positive, logistic
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2406.08414",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="you have pairs and want to try a loss that was found by search in place of DPO's; keep"
    " beta small.",
    rate_factor=0.05,
)
class DiscoPOP(Pairs):
    """(1 - m) * logistic(x) + m * exp(-x), x = beta * margin, m = s(x / discopop_tau)."""

    discopop_tau: Positive = 0.05  # temperature of the transition between the two parts

    def cost(self, margin):
        x = self.beta * margin
        m = torch.sigmoid(x / self.discopop_tau)
        return (1 - m) * logistic(x) + m * torch.exp(-x)
