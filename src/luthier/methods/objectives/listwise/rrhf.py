"""RRHF: ranks completions by score with a hinge on length-normalised likelihoods, and fits the best one.

p_i = sum of log p(token) / length^length_penalty. For every two completions of a row of which i has the lower
score: max(0, p_i - p_j). The likelihood term is the negative log-likelihood of the best completion. No
reference and no critic. PerfRL trains code models so, on scores from running their programs.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.listwise._lists import by_row, ordered
from luthier.methods.objectives.policy_gradient._policy_gradient import NotNegative
from luthier.methods.objectives.preference._pairs import best_and_worst
from luthier.registry import objective


@objective(
    paper="arXiv:2304.05302",
    requires=[COMPLETIONS, SCORES, LOGPROBS],
    use_when="completions have scores and you want a ranking loss without a reference or a critic.",
    costs="a forward and backward pass over every completion.",
    starting_rate="that of `sft`.",
)
class RRHF(Objective):
    """ranking * sum of max(0, p_worse - p_better) + sft * -log p of the best completion."""

    unit = "group"

    length_penalty: Annotated[float, Field(ge=0)] = 1.0  # power of the length that likelihoods are divided by
    ranking: NotNegative = 1.0  # weight of the ranking loss
    sft: NotNegative = 1.0  # weight of the likelihood of the best completion

    def loss(self, roles, batch):
        sums = batch.sums(roles.policy.logprobs(batch))
        normalised = sums / batch.lengths.clamp(min=1) ** self.length_penalty
        better, worse = ordered(batch)
        gap = normalised[worse] - normalised[better]
        batch.note(accuracy=(gap < 0).float())
        best, _ = best_and_worst(batch)
        return self.ranking * by_row(batch, better, gap.clamp(min=0)) - self.sft * sums[best]
