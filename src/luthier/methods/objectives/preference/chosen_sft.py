"""The SFT term beside a preference loss, which keeps the chosen completion likely: RPO is `dpo +
1.0*chosen_sft`.

The average is over the chosen tokens of the global batch (TRL's `sft` loss: per micro-batch); the papers sum
over a completion (2405.16436) or average within it (2404.19733). Rows whose completions have equal scores
have no chosen completion and contribute no tokens.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.preference._pairs import best_and_worst
from luthier.registry import objective


@objective(
    paper="arXiv:2405.16436",
    row="rpo-sft-reg",
    requires=[PAIRS, LOGPROBS],
    use_when="a preference loss lowers the likelihood of chosen completions too: add `+"
    " 1.0*chosen_sft`. By itself it is SFT on the chosen side.",
    costs="beside a preference loss next to nothing: it uses the same forward pass.",
    covers="the SFT term beside any preference loss, `dpo + 0.5*chosen_sft`.",
    omits="the curve of a gold reward against the divergence.",
    tests=[
        "methods/objectives/preference/test_losses.py::test_the_sft_term_keeps_the_chosen_likely",
    ],
)
class ChosenSFT(Objective):
    """-log p of each token of a row's best completion."""

    def chosen(self, batch):
        """[T] is this a token of a best completion?"""
        best, worst = best_and_worst(batch)
        chosen = torch.zeros_like(batch.completion, dtype=torch.bool)
        chosen[best[best != worst]] = True
        return chosen[batch.owner]

    def count(self, batch):
        return int(self.chosen(batch).sum())

    def rows_of_units(self, batch):
        return batch.group[batch.owner][self.chosen(batch)]

    def loss(self, roles, batch):
        return -roles.policy.logprobs(batch)[self.chosen(batch)]
