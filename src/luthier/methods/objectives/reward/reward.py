"""A reward model trained on pairs (Bradley-Terry): the value of the chosen completion should exceed that of
the rejected one.

Rows may have a `margin` by which it should be higher (Llama 2). center_rewards_coefficient keeps values near
zero.
"""

import torch

from luthier.methods.architectures._base import VALUES
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.policy_gradient._policy_gradient import NotNegative
from luthier.methods.objectives.preference._pairs import best_and_worst, logistic
from luthier.registry import objective


@objective(
    paper="arXiv:2204.05862",
    requires=[PAIRS, VALUES],
    use_when="you have pairs and want a reward model, for reinforcement learning or best-of-n.",
    costs="a forward and backward pass over both completions, on a network with a scalar head.",
    starting_rate="1e-4 is TRL's default; full fine-tuning of large models takes less.",
    rate_factor=0.5,
)
class Reward(Objective):
    """-log sigmoid(r_chosen - r_rejected - margin) + center_rewards_coefficient * (r_chosen +
    r_rejected)^2.
    """

    unit = "group"

    # weight of the squared sum of both values (TRL recommends 0.01)
    center_rewards_coefficient: NotNegative = 0.0

    def loss(self, roles, batch):
        rewards = batch.last(roles.policy.outputs(batch).values)
        best, worst = best_and_worst(batch)
        differ = best != worst
        chosen, rejected = (
            torch.where(differ, rewards[side], rewards[side].detach()) for side in (best, worst)
        )
        batch.note(
            accuracy=(chosen > rejected)[differ].float(), margin=(chosen - rejected)[differ], reward=rewards
        )
        margin = torch.tensor([float(row.get("margin", 0.0)) for row in batch.rows], device=rewards.device)
        return (
            logistic(chosen - rejected - margin)
            + self.center_rewards_coefficient * (chosen + rejected).square()
        )
