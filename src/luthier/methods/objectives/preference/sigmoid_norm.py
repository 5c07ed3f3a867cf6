"""Length-normalised DPO (Tulu 3): log-ratios are means over tokens, so length gives no advantage.

beta is larger than DPO's, since a mean is smaller than a sum: the paper uses 5.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Beta, log_ratios
from luthier.methods.objectives.preference.dpo import DPO
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2411.15124",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="DPO favours long answers: log-ratios are means over tokens. Take a larger beta (5 in the"
    " paper).",
    rate_factor=0.05,
)
class SigmoidNorm(DPO):
    """-log sigmoid(beta * (mean log-ratio of the best - mean log-ratio of the worst))."""

    beta: Beta = 5.0  # strength of the regularisation towards the reference, for means

    def values(self, roles, batch):
        return batch.means(log_ratios(roles, batch))
