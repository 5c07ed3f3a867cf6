"""GSPO: GRPO with one importance ratio for a whole completion, the geometric mean of its tokens' ratios, so
that all tokens of a completion are clipped together.

Meant for several steps on the same samples (`num_iterations`), and for mixtures of experts, whose token
ratios jump with the routing. On fresh samples its gradient is that of `grpo`.
"""

from typing import Annotated

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import SCORES
from luthier.methods.objectives.policy_gradient._policy_gradient import GroupClipped, NotNegative
from luthier.methods.stages._base import SAMPLES
from luthier.registry import Range, objective


@objective(
    paper="arXiv:2507.18071",
    requires=[SAMPLES, SCORES, LOGPROBS],
    use_when="several steps are made on the same samples and token-wise clipping is unstable, as with"
    " mixtures of experts or long answers.",
    rate_factor=0.05,
)
class GSPO(GroupClipped):
    """Mean over a completion's tokens of the surrogate clipped by completion."""

    unit = "sequence"

    # lower clip bound: 1 - epsilon; far below that of token ratios, as means move little
    epsilon: Annotated[NotNegative, Range(1e-4, 0.1, log=True)] = 3e-4
    epsilon_high: NotNegative | None = 4e-4  # upper clip bound: 1 + epsilon_high; null: epsilon

    def log_ratio(self, batch, change):
        return batch.means(change)[batch.owner]

    def loss(self, roles, batch):
        return batch.means(self.tokens(roles, batch))
