"""Trajectory balance: the policy learns to sample in proportion to a reward, p(y | prompt) ~ R(y)^beta,
where policy gradients learn the best answer alone.

A text is built token by token in one way only, so the balance is (log Z + log p(y) - beta log R(y))^2. What
a prompt asks for may be part of it: with stages `draw_weights` and `scalarize` the policy is one for every
trade-off of several rewards (multi-objective GFlowNets). Samples may be of any policy: the policy's own,
tempered ones, given ones.
"""

from typing import Annotated, Literal

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.methods.roles.networks.log_partition import LOG_PARTITION
from luthier.registry import Range, objective


@objective(
    paper="arXiv:2210.12765",
    row="mo-gflownet",
    requires=[COMPLETIONS, SCORES, LOGPROBS],
    use_when="many different good answers are wanted, in proportion to how good they are, or one policy"
    " for every trade-off of several rewards.",
    costs="a forward and backward pass over every completion.",
    starting_rate="that of `grpo`, or up to ten times as much.",
    rate_factor=0.1,
    covers="trajectory balance for sequences with a learned log Z or one estimated within a row, a reward"
    " exponent; linear, product and Tchebycheff trade-offs with weights from a Dirichlet"
    " distribution in the prompt.",
    omits="thermometer codes and random exponents (weights are numbers in the prompt), the"
    " active-learning loop.",
    tests=[
        "methods/objectives/gflownet/test_gflownets.py::test_it_samples_in_proportion_for_unseen_weights",
        "methods/objectives/gflownet/test_gflownets.py::test_the_estimate_within_a_row_is_the_variance",
    ],
)
class TrajectoryBalance(Objective):
    """(log Z + log p - beta log R)^2 of each completion."""

    unit = "sequence"

    beta: Annotated[float, Field(gt=0), Range(0.5, 32.0, log=True)] = 1.0  # exponent of the reward
    # log Z of a prompt: the mean of beta log R - log p over its completions, or a role that learns it
    log_z: Literal["row", "learned"] = "row"
    log_rewards: bool = False  # scores are log R already, such as a reward model's
    least: Annotated[float, Field(gt=0)] = 1e-4  # rewards are raised to this before the logarithm

    @property
    def active_requires(self):
        return self.requires | {LOG_PARTITION} if self.log_z == "learned" else self.requires

    def loss(self, roles, batch):
        rewards = batch.column("scores")
        if not self.log_rewards:
            rewards = rewards.clamp(min=self.least).log()
        gap = batch.sums(roles.policy.logprobs(batch)) - self.beta * rewards
        if self.log_z == "learned":
            log_z = roles.log_partition.value(roles.policy, batch)
        elif any(len(row["completions"]) < 2 for row in batch.rows):
            raise RecipeError(
                "objective 'trajectory_balance' compares the completions of a prompt: set `n: 2` or more, or"
                " `log_z: learned`"
            )
        else:
            log_z = -batch.over_group(gap.detach())
        batch.note(log_z=log_z)
        return (log_z + gap).square()
