"""REINFORCE++: PPO's clipping without its critic; rewards to go with the KL in each token's reward,
normalised over the whole global batch instead of within a prompt's completions.

The stage `advantages` computes them; with its `baseline: group` this is REINFORCE++-baseline, for prompts
with several completions.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.objectives.policy_gradient._policy_gradient import Clipped
from luthier.methods.stages._base import SAMPLES
from luthier.methods.stages.rollout.advantages import TOKEN_ADVANTAGES
from luthier.registry import objective


@objective(
    paper="arXiv:2501.03262",
    requires=[SAMPLES, TOKEN_ADVANTAGES, LOGPROBS],
    use_when="you want PPO without a critic, with one or few completions of each prompt, and prompts of"
    " unequal difficulty make advantages within a group mislead.",
    rate_factor=0.05,
)
class ReinforcePP(Clipped):
    """The clipped surrogate of each token, with its own advantage."""

    def advantages(self, roles, batch):
        return batch.per_token("token_advantages")

    def loss(self, roles, batch):
        return self.tokens(roles, batch)
