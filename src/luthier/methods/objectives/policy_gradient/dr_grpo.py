"""Dr. GRPO: GRPO without its two biases, towards long wrong completions and towards rows with little reward
spread.

The sum over a completion is divided by a constant instead of its length, and advantages are not divided by
the standard deviation.
"""

from typing import Annotated, Literal

from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import SCORES
from luthier.methods.objectives.policy_gradient._policy_gradient import GroupClipped
from luthier.methods.stages._base import SAMPLES
from luthier.registry import objective


@objective(
    paper="arXiv:2503.20783",
    requires=[SAMPLES, SCORES, LOGPROBS],
    use_when="GRPO makes wrong answers longer and longer, or over-weights prompts of little spread.",
    rate_factor=0.05,
)
class DrGRPO(GroupClipped):
    """Sum over a completion's tokens of the clipped surrogate, over max_completion_length."""

    unit = "sequence"

    # divide advantages by the standard deviation in their row, in the micro-batch, or not at all
    scale_rewards: Literal["group", "batch", "none"] = "none"
    # constant by which every sum is divided; the rollout's max_new_tokens
    max_completion_length: Annotated[int, Field(ge=1)] = 256

    def loss(self, roles, batch):
        return batch.sums(self.tokens(roles, batch)) / self.max_completion_length
