"""SFT under an f-divergence: raises the log-ratio to the reference along a concave curve, so that the policy
stays closer to it.

Seen as learning an implicit reward r, plain SFT has no term that keeps the policy near the reference. The
curves follow the family of inverse soft-Q learning; the paper's own expression could not be verified.
"""

from typing import Literal

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.preference._pairs import Beta, log_ratios
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective

CURVES = {  # divergence -> phi(r)
    "total_variation": lambda r: r,
    "chi2": lambda r: r - r.square() / 4,
    "hellinger": lambda r: r.clamp(min=-0.99) / (1 + r.clamp(min=-0.99)),
}


@objective(
    paper="arXiv:2507.00018",
    row="sft-dpo-bridge",
    requires=[COMPLETIONS, REFERENCE, LOGPROBS],
    use_when="plain SFT drifts too far from the reference: a concave curve of the log-ratio keeps it close.",
    starting_rate="that of `sft`.",
    covers="SFT by any f-divergence with the slope of its curve as weights; evaluator `implicit_value`.",
    omits="the form is reconstructed from the paper's text.",
    tests=[
        "methods/objectives/supervised/test_f_sft.py::test_f_sft_is_sft_where_the_curve_is_straight",
        "methods/objectives/supervised/test_f_sft.py::test_f_sft_weighs_by_the_slope_of_its_curve",
        "methods/objectives/supervised/test_f_sft.py::test_chi2_stays_nearer_to_the_reference",
    ],
)
class FSFT(Objective):
    """-phi(r), r = beta * log-ratio of a token or of a completion; phi(r) = r is SFT times beta."""

    beta: Beta = 0.1  # scale of the implicit reward
    # r, r - r^2 / 4, or r / (1 + r) above r = -1
    divergence: Literal["total_variation", "chi2", "hellinger"] = "chi2"
    level: Literal["token", "sequence"] = "token"  # whether r is the log-ratio of a token or of a completion

    def count(self, batch):
        return batch.count(self.level)

    def rows_of_units(self, batch):
        return batch.group if self.level == "sequence" else batch.group[batch.owner]

    def loss(self, roles, batch):
        ratios = log_ratios(roles, batch)
        r = self.beta * (ratios if self.level == "token" else batch.sums(ratios))
        batch.note(reward=r)
        return -CURVES[self.divergence](r)
