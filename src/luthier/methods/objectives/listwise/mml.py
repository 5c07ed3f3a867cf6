"""Marginal likelihood of several right answers: -1/beta log of the sum of p(answer)^beta over a row's.

With `beta: 1` it is maximum marginal likelihood (MML): one of the answers is enough, and the likeliest learns
the most. Towards 0 every answer of the row learns alike, as in maximum likelihood on an augmented set; at 0
it is their mean, -log p. The gradient is that of likelihood, each answer weighted by softmax(beta log p).
Departs: the paper's augmented likelihood is a sum over a row's answers, here it is their mean, so that a row
with many does not count more; `sft` with answers in rows of their own is that sum.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.registry import Range, objective


@objective(
    paper="arXiv:2205.14318",
    row="self-sampled-partial-solutions",
    former="beta_mml",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="a row has several right answers, and the model should be able to give any of them.",
    costs="a forward and backward pass over every completion of a row.",
    starting_rate="that of `sft`.",
    covers="MML, beta-MML and, as its limit, likelihood of all solutions alike.",
    omits="one solution drawn uniformly a step; the sum over solutions in place of their mean.",
    tests=[
        "methods/objectives/listwise/test_mml.py::test_it_is_marginal_likelihood_and_its_limit",
        "methods/objectives/listwise/test_mml.py::test_the_gradient_is_weighted_likelihood",
    ],
)
class MML(Objective):
    """One value a row: -1/beta log sum exp(beta log p) over its completions."""

    unit = "group"

    # 1: marginal likelihood; 0: all answers alike; the paper's between them is 0.25
    beta: Annotated[float, Field(ge=0, le=1), Range(0.0, 1.0)] = 0.25

    def loss(self, roles, batch):
        logps = batch.sums(roles.policy.logprobs(batch))
        zeros = logps.new_zeros(len(batch.rows))
        if self.beta == 0:
            return -zeros.scatter_reduce(0, batch.group, logps, "mean", include_self=False)
        scaled = self.beta * logps
        top = batch.over_group(scaled.detach(), "amax")
        sums = zeros.index_add(0, batch.group, (scaled - top).exp())
        highest = zeros.scatter_reduce(0, batch.group, scaled.detach(), "amax", include_self=False)
        return -(torch.log(sums) + highest) / self.beta
