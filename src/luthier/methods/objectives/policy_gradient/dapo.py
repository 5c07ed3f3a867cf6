"""DAPO's loss: GRPO averaged over tokens, with a higher upper clip bound and no KL.

The average is over the tokens of the global batch; TRL's `bnpo` is the same per micro-batch. The paper's
other parts are not losses: dynamic sampling is a stage, the penalty on overlong completions a reward.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import SCORES
from luthier.methods.objectives.policy_gradient._policy_gradient import GroupClipped, NotNegative
from luthier.methods.stages._base import SAMPLES
from luthier.registry import objective


@objective(
    paper="arXiv:2503.14476",
    requires=[SAMPLES, SCORES, LOGPROBS],
    use_when="you train on verifiable rewards with long answers and want every token to weigh alike,"
    " without a KL to the reference.",
    rate_factor=0.05,
)
class DAPO(GroupClipped):
    """The clipped surrogate of each token."""

    epsilon_high: NotNegative | None = 0.28  # upper clip bound: 1 + epsilon_high; null: epsilon

    def loss(self, roles, batch):
        return self.tokens(roles, batch)
