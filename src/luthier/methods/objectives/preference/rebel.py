"""REBEL: regresses differences of log-ratios onto differences of rewards, over all pairs of a row's samples.

At its minimum over enough samples the policy is proportional to reference * exp(reward / beta), the optimum
of KL-regularised reinforcement learning (Gao et al., 2024). With a likelihood under the reference as the
reward (stage `likelihood`) this is reference^(1 + 1/beta): sharpening.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.preference._pairs import Beta, log_ratios
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2404.16767",
    row="sharpening",
    requires=[COMPLETIONS, SCORES, REFERENCE, LOGPROBS],
    use_when="samples have rewards whose size matters, not only their order, and you want reinforcement"
    " learning's optimum by regression.",
    costs="a forward and backward pass over all completions of a row, and one of the reference.",
    starting_rate="that of `dpo`.",
    rate_factor=0.05,
    covers="the regression on pairs whose optimum is the sharpened model.",
    tests=["methods/plans/rounds/test_sharpening.py::test_the_optimum_is_the_power_of_the_base"],
)
class REBEL(Objective):
    """The mean over pairs of a row of (beta * difference of log-ratios - difference of scores)^2."""

    unit = "group"

    beta: Beta = 0.1  # strength of the regularisation towards the reference

    def loss(self, roles, batch):
        values = batch.sums(log_ratios(roles, batch))
        gap = self.beta * values - batch.column("scores").to(values)
        # over all pairs of n numbers, squared differences sum to n times the squared distances to the mean
        distance = (gap - batch.over_group(gap)).square()
        sizes = batch.group.bincount(minlength=len(batch.rows)).to(values)
        totals = values.new_zeros(len(batch.rows)).index_add(0, batch.group, distance)
        batch.note(gap=distance.detach())
        return 2 * totals / (sizes - 1).clamp(min=1)
