"""ASFT, aligned SFT: raises the likelihood of the chosen completion and lowers that of the rejected one,
without a reference.

p is the mean probability of a token (the paper's length normalisation, taken as the geometric mean). Two
terms: `chosen_sft`, and beta times this one. It is not the later "anchored SFT" with the same acronym.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Pairs, log1mexp
from luthier.methods.objectives.preference.chosen_sft import ChosenSFT
from luthier.registry import objective


@objective(
    paper="arXiv:2409.10571",
    row="asft-align",
    requires=[PAIRS, LOGPROBS],
    use_when="you want likelihood and preference in one loss without a reference model, with each"
    " side's probability bounded apart.",
    covers="the loss in closed form.",
    tests=[
        "methods/objectives/preference/test_asft_align.py::test_asft_in_closed_form",
        "methods/objectives/preference/test_asft_align.py"
        "::test_asft_and_orpo_without_their_second_term_are_sft_on_the_chosen",
    ],
    rate_factor=0.05,
)
class ASFT(Pairs):
    """-log p of each token of the best + beta * (-log p(best) - log(1 - p(worst)))."""

    def terms(self):
        return [(1.0, ChosenSFT()), (1.0, self)]

    def values(self, roles, batch):
        """[N] log p, the mean over a completion's tokens."""
        return batch.means(roles.policy.logprobs(batch))

    def pair(self, better, worse):
        return self.beta * (-better - log1mexp(worse))
