"""B-Coder: a language model as the value function of its own tokens, learned from stored programs.

With l the log-probabilities, the advantage of a token is A = alpha * (l - max l), never above 0, and its
value Q = A + V, with V from a critic; softmax(Q / alpha) is the policy, whatever V. Bellman errors train it
on any programs, with rewards from unit tests at their ends. The value of the next state is that of the token
which the *reference* thinks likeliest: a conservative operator, whose fixed point is the value of the
reference made greedy. First the critic alone learns (`phase: critic`), then the policy with it.

Departs: one critic for both phases, which goes on learning in the second one, in place of a second head on a
frozen first.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.methods.roles._base import CRITIC, REFERENCE_OUTPUTS
from luthier.model.batch import Batch
from luthier.registry import Range, objective


@objective(
    paper="arXiv:2310.03173",
    row="b-coder",
    requires=[COMPLETIONS, SCORES, CRITIC, REFERENCE_OUTPUTS, LOGPROBS, TOPK],
    use_when="many scored programs are stored, by people and models, and fresh samples are dear; `ppo` and"
    " `grpo` learn from samples of the policy alone.",
    costs="a forward and backward pass over every completion, the critic and a pass of the reference.",
    starting_rate="that of `ppo`.",
    rate_factor=0.05,
    covers="advantages from logits, the conservative operator, both phases, the terms on right programs, and"
    " the reward that a value function implies.",
    omits="the residual head, ranking by the implied reward at decoding, APPS.",
    tests=[
        "methods/objectives/policy_gradient/test_b_coder.py::test_the_values_are_the_policys",
        "methods/objectives/policy_gradient/test_b_coder.py::test_the_operator_converges_to_the_greedy_value",
        "methods/objectives/policy_gradient/test_b_coder.py::test_the_reward_comes_back_and_ranks",
        "methods/objectives/policy_gradient/test_b_coder.py::test_the_loss_is_that_of_its_parts",
    ],
)
class BCoder(Objective):
    """Squared Bellman error of each token; in the second phase with the advantages and the cross-entropy of
    right completions (score `right` or more).
    """

    phase: Literal["critic", "policy"] = "policy"  # critic: the policy's logits stay, only the critic learns
    alpha: Annotated[float, Field(gt=0), Range(0.1, 10.0, log=True)] = 1.0  # temperature of Q
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0  # how much the next token's value counts
    adv_coef: Annotated[float, Field(ge=0)] = 0.1  # weight of |A| of the tokens of right completions
    ce_coef: Annotated[float, Field(ge=0)] = 0.5  # weight of their cross-entropy
    right: float = 1.0  # least score of a right completion
    cap: float | None = 1.0  # largest value of a next state; the best reward there is

    def loss(self, roles, batch):
        outputs = roles.policy.outputs(batch)
        logp, best = outputs.logprobs, outputs.top(1)[0][:, 0]
        advantage = self.alpha * (logp - best)
        if self.phase == "critic":
            advantage = advantage.detach()
        value = roles.critic.values(roles.policy, batch)
        with torch.no_grad():
            likeliest = roles.reference.outputs(batch).first()
            greedy = self.alpha * (outputs.at(likeliest[:, None])[:, 0] - best) + value
            target = bellman(batch, self.rewards(batch), self.capped(greedy), self.gamma)
        error = (target - advantage - value).square()
        batch.note(value_loss=error.detach(), advantage=advantage.detach())
        if self.phase == "critic":
            return error
        good = (batch.column("scores") >= self.right)[batch.owner]
        extra = self.adv_coef * advantage.abs() - self.ce_coef * logp
        return error + torch.where(good, extra, 0.0)

    def rewards(self, batch: Batch) -> Tensor:
        """[T] the score at a completion's last token."""
        last = batch.place + 1 == batch.lengths[batch.owner]
        return torch.where(last, batch.column("scores")[batch.owner], 0.0)

    def capped(self, values: Tensor) -> Tensor:
        return values if self.cap is None else values.clamp(max=self.cap)


def bellman(batch: Batch, rewards: Tensor, greedy: Tensor, gamma: float) -> Tensor:
    """[T] r + gamma Q(s', a'), 0 behind the last token. greedy: [T] the value of the reference's likeliest
    token at each place.
    """
    after = torch.cat([greedy[1:], greedy.new_zeros(1)])
    last = batch.place + 1 == batch.lengths[batch.owner]
    return rewards + gamma * torch.where(last, 0.0, after)


def implied_rewards(batch: Batch, values: Tensor, greedy: Tensor, gamma: float) -> Tensor:
    """[T] the rewards for which these values would be the fixed point: Q(s, a) - gamma Q(s', a'). values: [T]
    of the tokens that are there; greedy: as in `bellman`.
    """
    return values - bellman(batch, torch.zeros_like(values), greedy, gamma)
