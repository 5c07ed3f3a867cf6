"""Order-preserving GFlowNets: the reward is learned from the order of answers alone, so no scale and no
exponent has to be chosen.

The policy's own log-probability is, up to a constant of the prompt, the logarithm of the reward that it
samples in proportion to; it is fitted to the order. Where several rewards are given by name the order is
that of Pareto: the completions that no other one of the row dominates are all best.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.methods.stages._base import REWARDS
from luthier.registry import objective


@objective(
    paper="arXiv:2310.00386",
    row="op-gflownet",
    requires=[COMPLETIONS, SCORES, LOGPROBS],
    use_when="only the order of answers can be trusted, or several rewards are wanted and no trade-off is.",
    costs="a forward and backward pass over every completion.",
    starting_rate="that of `grpo`, or up to ten times as much.",
    rate_factor=0.1,
    covers="the loss of pairs and of Pareto sets for sequences, where log Z cancels.",
    omits="backward policies (a text is built in one way only), the replay buffer of the best.",
    tests=[
        "methods/objectives/gflownet/test_gflownets.py::test_the_order_is_learned",
        "methods/objectives/gflownet/test_gflownets.py::test_only_the_order_counts",
        "methods/objectives/gflownet/test_gflownets.py::test_pareto_points_get_the_mass",
    ],
)
class OrderPreserving(Objective):
    """Cross-entropy of the row's order with that of the policy's probabilities."""

    unit = "group"

    # pairs: every pair of completions, ties at one half; set: which of all completions of the row are best
    over: Literal["pairs", "set"] = "pairs"
    rewards: tuple[str, ...] = ()  # names in the column `rewards`, whose order is Pareto's; none: the scores

    def __post_init__(self):
        if self.rewards and self.over == "pairs":
            raise ValueError("rewards: the order of Pareto is partial; set `over: set`")

    @property
    def active_requires(self):
        return self.requires | {REWARDS} if self.rewards else self.requires

    def loss(self, roles, batch):
        likely = batch.sums(roles.policy.logprobs(batch))
        others = batch.group[:, None] == batch.group
        others.fill_diagonal_(False)
        if self.over == "pairs":
            scores = batch.column("scores")
            gap = likely[:, None] - likely
            target = (torch.sign(scores[:, None] - scores) + 1) / 2
            cost = F.binary_cross_entropy_with_logits(gap, target, reduction="none") * others
            each = cost.sum(1) / others.sum(1).clamp(min=1)
        else:
            best = self.best(batch, others).float()
            most = batch.over_group(likely.detach(), "amax")
            whole = batch.over_group((likely - most).exp(), "sum").log() + most
            each = (whole - likely) * best / batch.over_group(best)
        by_row = each.new_zeros(len(batch.rows)).index_add(0, batch.group, each)
        sizes = torch.bincount(batch.group, minlength=len(batch.rows))
        return by_row / sizes

    def best(self, batch, others: Tensor) -> Tensor:
        """[N] does no other completion of its row dominate it?"""
        columns = [batch.reward(name) for name in self.rewards] or [batch.column("scores")]
        values = torch.stack(columns, 1)
        no_worse = (values[None] >= values[:, None]).all(2)
        better = (values[None] > values[:, None]).any(2)
        return ~(no_worse & better & others).any(1)
