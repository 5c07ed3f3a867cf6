"""SPPO, self-play by regression: fits each side's log-ratio to its win rate against the policy that sampled
it.

The reference is the policy of the previous round (the plan `sppo` sets it). With a column `win_rates` (the
stage of that name computes it from scores) targets are soft; without it, the best completion has win rate 1
and the worst 0 (TRL's `sppo_hard`, which sums the two sides where this averages them).
"""

import torch
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import Beta, Pairs, best_and_worst
from luthier.methods.roles._base import REFERENCE
from luthier.model.batch import Batch
from luthier.registry import objective


@objective(
    paper="arXiv:2405.00675",
    row="sppo",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="you have a judge that gives win rates and play rounds against the last policy; plan"
    " `sppo` runs them.",
    covers="the squared loss to win rates, and rounds of it.",
    omits="a third of the prompts for each round: every round uses all.",
    tests=[
        "methods/objectives/preference/test_sppo.py::test_sppo_multiplies_by_how_often_an_answer_wins",
        "methods/objectives/preference/test_sppo.py"
        "::test_sppo_stays_near_the_equilibrium_of_rock_paper_scissors",
    ],
    rate_factor=0.05,
)
class SPPO(Pairs):
    """The mean over both sides of (log-ratio - (win rate - 1/2) / beta)^2."""

    beta: Beta = 1e-3  # 1 / eta of the paper

    def loss(self, roles, batch):
        values, target = self.values(roles, batch), (self.win_rates(batch) - 0.5) / self.beta
        best, worst = best_and_worst(batch)
        self.note(batch, values.detach(), best, worst)
        error = (values - target).square()
        cost = (error[best] + error[worst]) / 2
        return torch.where(best != worst, cost, cost.detach())

    def win_rates(self, batch: Batch) -> Tensor:
        """[N] the share of the policy's answers that a completion beats."""
        if "win_rates" in batch.rows[0]:
            return batch.column("win_rates")
        best, worst = best_and_worst(batch)
        rates = torch.full((len(batch.completion),), 0.5, device=batch.ids.device)
        rates[best[best != worst]], rates[worst[best != worst]] = 1.0, 0.0
        return rates
