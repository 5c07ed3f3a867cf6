"""APO-zero: raises the likelihood of the chosen completion and lowers that of the rejected one, each relative
to the reference.

For pairs whose chosen completion is better than the model's own answers.
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
    use_when="the chosen completions are better than what the model writes by itself, and their"
    " likelihood should rise.",
    rate_factor=0.05,
)
class APOZero(Pairs):
    """(1 - s(r_chosen)) + s(r_rejected), r = beta * log-ratio."""

    def pair(self, better, worse):
        return 1 - torch.sigmoid(self.beta * better) + torch.sigmoid(self.beta * worse)
