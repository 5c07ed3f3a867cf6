"""EXO on pairs: the reverse KL between the policy's preference and a smoothed label, where DPO uses the
forward KL.

The paper's form for lists of K samples is left out; its labels need a reward model.
"""

import math
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2402.00856",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="you have pairs and want the policy to concentrate on the better mode (reverse KL) where"
    " DPO would cover both.",
    rate_factor=0.05,
)
class EXO(Pairs):
    """KL(q || p), q = [s(beta * margin), s(-beta * margin)], p = [1 - label_smoothing, label_smoothing]."""

    # p of the rejected completion; at 0 the KL would be infinite
    label_smoothing: Annotated[float, Field(gt=0, lt=1)] = 1e-3

    def cost(self, margin):
        won, lost = F.logsigmoid(self.beta * margin), F.logsigmoid(-self.beta * margin)
        return won.exp() * (won - math.log1p(-self.label_smoothing)) + lost.exp() * (
            lost - math.log(self.label_smoothing)
        )
