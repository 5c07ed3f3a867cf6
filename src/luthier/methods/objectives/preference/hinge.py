"""The hinge loss of SLiC on DPO's margin, as normalised in RSO: pairs with a sufficient margin have no
gradient.

RSO also samples its pairs by rejection, which is done with stages here. SLiC-HF itself has no reference and
adds an SFT term.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2309.06657",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="you have pairs and those already well separated should have no influence any more.",
    rate_factor=0.05,
)
class Hinge(Pairs):
    """max(0, 1 - beta * margin)."""

    def cost(self, margin):
        return (1 - self.beta * margin).relu()
