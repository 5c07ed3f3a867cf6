"""Self-J: a judge learns to rate answers without a reference, from its own ratings with one.

A row's completions are the ratings. Their probabilities are those of the policy, of these texts alone; the
mean rating is fitted to `quality`, and the distribution is held near the one that the same model had with the
right answer before it.
"""

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.methods.stages.curate.self_ratings import QUALITY, REFERENCE_RATINGS
from luthier.registry import Range, objective


@objective(
    paper="arXiv:2409.00935",
    row="self-j",
    requires=[COMPLETIONS, SCORES, REFERENCE_RATINGS, QUALITY, LOGPROBS],
    use_when="stage `self_ratings` has made rows for a judge without references.",
    costs="a forward and backward pass over each question, with the ratings behind it.",
    starting_rate="that of `sft`.",
    covers="regression of the mean rating, and the KL to the ratings with a reference; reward `rating_judge`"
    " for best-of-n, evaluator `selective` for abstention.",
    omits="AlpacaEval, which needs a judge by others.",
    tests=[
        "methods/objectives/reward/test_self_judge.py::test_without_kl_it_is_regression",
        "methods/objectives/reward/test_self_judge.py::test_a_judge_rates_better_than_it_did",
        "methods/evaluators/calibration/test_selective.py::test_the_curve_is_the_brute_force_one",
    ],
)
class SelfJudge(Objective):
    """(mean rating - quality)^2 + kl_coef * KL(ratings with the reference || ratings)."""

    unit = "group"

    kl_coef: Annotated[float, Field(ge=0), Range(0.05, 2.0, log=True)] = 0.5  # weight of the KL

    def loss(self, roles, batch):
        logs = batch.sums(roles.policy.logprobs(batch))
        most = batch.over_group(logs.detach(), "amax")
        logs = logs - most - batch.over_group((logs - most).exp(), "sum").log()
        mean = self.by_row(batch, logs.exp() * batch.column("scores"))
        quality = torch.tensor([float(row["quality"]) for row in batch.rows], device=logs.device)
        informed = batch.column("reference_ratings")
        divergence = self.by_row(batch, torch.special.xlogy(informed, informed) - informed * logs)
        batch.note(rating=mean, kl=divergence)
        return (mean - quality).square() + self.kl_coef * divergence

    def by_row(self, batch, values):
        """[N] -> [rows] sums."""
        return values.new_zeros(len(batch.rows)).index_add(0, batch.group, values)
