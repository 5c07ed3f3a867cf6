"""Direct preference optimization: a reward model's loss on the policy's own log-ratios.

With label_smoothing it is conservative DPO (cDPO): that share of the pairs is taken to be labelled the wrong way round.
"""

import torch.nn.functional as F

from luthier.method import objective
from luthier.objectives._pairs import Pairs, Probability


@objective(paper="arXiv:2305.18290", wants="pairs reference logprobs")
class DPO(Pairs):
    """-log sigmoid(beta * (log-ratio of the best - log-ratio of the worst))."""

    label_smoothing: Probability = 0.0  # share of pairs that may be labelled the wrong way round

    def cost(self, margin):
        right, wrong = F.logsigmoid(self.beta * margin), F.logsigmoid(-self.beta * margin)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong
