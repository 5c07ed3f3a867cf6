"""APO-down: lowers the likelihood of both completions, that of the rejected one more.

For pairs whose chosen completion is worse than the model's own answers.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2408.06266",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="even the chosen completions are worse than what the model writes by itself: both lose"
    " likelihood, the rejected one more.",
    rate_factor=0.05,
)
class APODown(Pairs):
    """s(r_chosen) + 1 - s(r_chosen - r_rejected), r = beta * log-ratio."""

    def pair(self, better, worse):
        return torch.sigmoid(self.beta * better) + 1 - torch.sigmoid(self.beta * (better - worse))
