"""Robust DPO: DPO's loss corrected for a known rate of flipped labels, so that its expectation equals that of
clean labels.

Unlike cDPO (`dpo` with label_smoothing) it subtracts the flipped loss, and can be negative.
"""

from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs, logistic
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2403.00409",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="you know about which share of the pairs is labelled the wrong way round.",
    rate_factor=0.05,
)
class Robust(Pairs):
    """((1 - e) * loss of the margin - e * loss of the negated margin) / (1 - 2 e)."""

    # e: share of pairs that are labelled the wrong way round
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1

    def cost(self, margin):
        e, x = self.label_smoothing, self.beta * margin
        return ((1 - e) * logistic(x) - e * logistic(-x)) / (1 - 2 * e)
