"""Direct preference optimization: a reward model's loss on the policy's own log-ratios.

With label_smoothing it is conservative DPO (cDPO), which assumes that this fraction of the pairs is labelled
the wrong way round.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs, Probability, logistic
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2305.18290",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="you have pairs of a better and a worse answer and want the standard method: no reward"
    " model and no sampling. It is a good first choice for pairs.",
    starting_rate="for full fine-tuning 5e-7 to 1e-6 (TRL's default is 1e-6); with LoRA about ten"
    " times as much.",
    rate_factor=0.05,
)
class DPO(Pairs):
    """-log sigmoid(beta * (log-ratio of the best - log-ratio of the worst))."""

    label_smoothing: Probability = 0.0  # share of pairs that may be labelled the wrong way round

    def cost(self, margin):
        return logistic(self.beta * margin, self.label_smoothing)
