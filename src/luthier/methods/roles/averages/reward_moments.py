"""Mean and deviation of all rewards of a run so far, for stage `normalize_rewards`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.methods.roles._base import Part, Role, brought
from luthier.processes import group
from luthier.registry import Capability, role

REWARD_MOMENTS = Capability(
    "reward_moments",
    says="mean and deviation of the rewards so far",
    advice="use `roles: {reward_moments: reward_moments}`",
)


@role(
    provides=[REWARD_MOMENTS],
    use_when="stage `normalize_rewards` brings rewards on one scale as training goes on.",
    costs="three numbers.",
    covers="the moments of all processes' rewards, in checkpoints.",
    tests=["methods/stages/rollout/test_reward_flow.py::test_moments_are_those_of_all_rewards_so_far"],
)
class RewardMoments(Role):
    """Welford's sums over every reward that was given."""

    def parts(self, policy):
        return {"moments": Moments().to(next(policy.model.parameters()).device)}

    def play(self, name, policy):
        return brought(policy, name, "moments")


class Moments(Part):
    """Count, mean and sum of squared deviations; in checkpoints."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self):
        super().__init__()
        for name in ("count", "mean", "squares"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def add(self, scores: Sequence[float]) -> None:
        """The scores of this process; those of the others are added with them."""
        values = torch.tensor(scores, dtype=torch.float64)
        sums = torch.stack([torch.tensor(float(len(values))).double(), values.sum(), values.square().sum()])
        count, total, squares = group.current().sum(sums).tolist()
        if not count:
            return
        mean = total / count
        before, gap = float(self.count), mean - float(self.mean)
        whole = before + count
        self.squares += max(squares - count * mean**2, 0.0) + gap**2 * before * count / whole
        self.mean += gap * count / whole
        self.count += count

    @property
    def deviation(self) -> float:
        """With n - 1; 0 before there are two rewards."""
        if self.count < 2:
            return 0.0
        return (float(self.squares) / (float(self.count) - 1)) ** 0.5
