"""CISPO: the importance weight is cut off and carries no gradient, so that no token is ever left out of an
update, however far its ratio has moved.
"""

from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import SCORES
from luthier.methods.objectives.policy_gradient._policy_gradient import GroupRelative
from luthier.methods.stages._base import SAMPLES
from luthier.registry import Range, objective


@objective(
    paper="arXiv:2506.13585",
    requires=[SAMPLES, SCORES, LOGPROBS],
    use_when="several steps are made on the same samples and clipping silences the rare tokens that matter,"
    " such as those at which a line of reasoning turns.",
    rate_factor=0.05,
)
class CISPO(GroupRelative):
    """-min(ratio, epsilon_high) * A * log p of each token, the ratio taken as a constant."""

    # largest weight of a token (TRL: epsilon_high)
    epsilon_high: Annotated[float, Field(gt=0), Range(1.2, 10.0, log=True)] = 5.0

    def surrogate(self, batch, logp, ratio, advantage):
        weight = ratio.detach()
        batch.note(clip_ratio=(weight > self.epsilon_high) & (advantage > 0))
        return -weight.clamp(max=self.epsilon_high) * advantage * logp

    def loss(self, roles, batch):
        return self.tokens(roles, batch)
