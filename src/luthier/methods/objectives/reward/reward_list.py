"""A reward model trained on lists: every better completion of a row should have a higher value than every
worse one.

As in Qwen2.5-Math, where k of n answers to a problem are right: the mean over the k(n - k) pairs of a right
and a wrong answer, so a row with many answers counts as much as one with two. Scores of more than two kinds
are compared in the same way; of completions with equal scores none is preferred.
"""

import torch

from luthier.methods.architectures._base import VALUES
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.listwise._lists import by_row, ordered
from luthier.methods.objectives.preference._pairs import logistic
from luthier.registry import objective


@objective(
    paper="arXiv:2409.12122",
    requires=[COMPLETIONS, SCORES, VALUES],
    use_when="you want a reward model from several answers to each prompt that are right or wrong.",
    costs="a forward and backward pass over every completion, on a network with a scalar head.",
    starting_rate="that of `reward`.",
    rate_factor=0.5,
)
class RewardList(Objective):
    """-log sigmoid(r_better - r_worse), the mean over all such pairs of a row."""

    unit = "group"

    def loss(self, roles, batch):
        rewards = batch.last(roles.policy.outputs(batch).values)
        better, worse = ordered(batch)
        margin = rewards[better] - rewards[worse]
        batch.note(accuracy=(margin > 0).float(), margin=margin, reward=rewards)
        # rows without a pair have a constant loss and no gradient
        return by_row(batch, better, logistic(margin), mean=True) + 0 * by_row(
            batch, torch.arange(len(rewards), device=rewards.device), rewards
        )
