"""Identity preference optimization: regresses the margin to a target instead of increasing it without bound.

Departs from the paper's formula as its authors' code and TRL do: log-ratios are means over tokens, not sums.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs, log_ratios
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2310.12036",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="DPO overfits near-certain pairs and margins grow without end: it regresses each margin"
    " to a fixed target.",
    rate_factor=0.05,
)
class IPO(Pairs):
    """(margin - 1 / (2 beta))^2; beta is the paper's tau."""

    def values(self, roles, batch):
        return batch.means(log_ratios(roles, batch))

    def cost(self, margin):
        return (margin - 1 / (2 * self.beta)).square()
