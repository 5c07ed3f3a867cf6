"""PPO: a clipped policy gradient whose baseline is a critic that learns along.

The stage `advantages` with `baseline: critic` computes generalised advantage estimates and the returns that
the critic learns; the critic is a role (`value_head`, `value_model`). The KL to the reference is part of
the reward (`kl_coef` of that stage). Several steps on each draw: `num_iterations`.
"""

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.objectives.policy_gradient._policy_gradient import Clipped, NotNegative
from luthier.methods.roles._base import CRITIC
from luthier.methods.stages._base import OLD_LOGPROBS, SAMPLES
from luthier.methods.stages.rollout.advantages import OLD_VALUES, RETURNS, TOKEN_ADVANTAGES
from luthier.registry import Range, objective


@objective(
    paper="arXiv:1707.06347",
    requires=[SAMPLES, OLD_LOGPROBS, TOKEN_ADVANTAGES, RETURNS, OLD_VALUES, CRITIC, LOGPROBS],
    use_when="one completion of each prompt is sampled and later tokens must be told apart from earlier"
    " ones, or you compare with published PPO; `grpo` and `rloo` need no critic.",
    costs="a forward and backward pass over every sampled completion, and the critic.",
    rate_factor=0.05,
    row="wsrl",
    covers="as its analogue for language models: a warm-up that samples from the tuned policy and fits"
    " the critic before the policy moves, and no offline rows afterwards.",
    omits="soft actor-critic, the ensemble of Q networks, several updates for a transition.",
    tests=["methods/objectives/policy_gradient/test_ppo.py::test_in_the_warm_up_only_the_critic_learns"],
)
class PPO(Clipped):
    """The clipped surrogate of each token plus vf_coef / 2 times the clipped squared error of its value."""

    vf_coef: Annotated[NotNegative, Range(0.05, 1.0, log=True)] = 0.1  # weight of the critic's loss
    # how far a value may move from that of the rollout and still gain; null: as far as it likes
    cliprange_value: Annotated[float, Field(gt=0)] | None = 0.2

    # first steps in which only the critic learns, so that the policy is not moved by one that knows nothing
    critic_warmup: Annotated[int, Field(ge=0)] = 0

    def advantages(self, roles, batch):
        return batch.per_token("token_advantages")

    def loss(self, roles, batch):
        values, returns = roles.critic.values(roles.policy, batch), batch.per_token("returns")
        error = (values - returns).square()
        if self.cliprange_value is not None:
            old = batch.per_token("old_values")
            near = old + (values - old).clamp(-self.cliprange_value, self.cliprange_value)
            error = torch.max(error, (near - returns).square())
        batch.note(value_loss=0.5 * error)
        critic = self.vf_coef * 0.5 * error
        if roles.clock.step < self.critic_warmup:
            return critic
        return self.tokens(roles, batch) + critic
