"""Binary classifier optimization on pairs: classifies the chosen completion as good and the rejected one as
bad, each separately.

As in TRL: without the paper's reward shift, which `bco` has.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs, logistic
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2404.04656",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="you have pairs and want each side judged by itself, so that the chosen completion cannot"
    " lose likelihood merely to widen the margin.",
    rate_factor=0.05,
)
class BCOPair(Pairs):
    """-log s(r_chosen) - log s(-r_rejected), r = beta * log-ratio."""

    def pair(self, better, worse):
        return logistic(self.beta * better) + logistic(-self.beta * worse)
