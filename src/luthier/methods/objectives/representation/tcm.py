"""Target classification by mutual information (TCM): predictions that are each certain and together varied,
on rows whose labels are not used.

log K plus the mean entropy of the predictions minus the entropy of the mean prediction, over the first token
of each answer and its K tokens (for a classifier its classes); without log K, which only moves its least
value to zero, where `pareto_da` holds the guide for satisfied, it is the paper's. It is the surrogate by
which Pareto domain adaptation chooses how to mix the losses of a source: `objective: {name: by_source, ...}`
gives it the rows of the target, as the guide of estimator `pareto_da`. Departs from the paper: predictions
are not refined by a class-wise discriminator of domains, so p is the model's own.
"""

from __future__ import annotations

import math

import torch

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.registry import objective


@objective(
    paper="arXiv:2112.04137",
    row="pareto-da",
    requires=[COMPLETIONS, LOGPROBS, TOPK],
    contract={
        "accumulation": "the mean prediction is that of a micro-batch",
    },
    use_when="rows of a target domain have no labels and should steer what is learned from a source.",
    costs="one forward and backward pass over each row.",
    starting_rate="that of the tuner.",
    covers="the surrogate on the target's predictions, as a guide of estimator `pareto_da`.",
    omits="the class-wise discriminator of domains that refines them; a domain-adversarial loss.",
    tests=[
        "methods/objectives/representation/test_tcm.py::test_tcm_is_its_entropies_by_hand",
        "methods/objectives/representation/test_tcm.py::test_a_step_guided_by_tcm_lowers_it_where_a_sum_does_not",
    ],
)
class TCM(Objective):
    """log K + mean entropy of the predictions - entropy of their mean: from 0 to log K."""

    unit = "batch"

    def loss(self, roles, batch):
        predictions = roles.policy.outputs(batch).apply(first_predictions, batch.place == 0)
        return surrogate(predictions)[None]


def first_predictions(logits: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """[C, V] logits, [C] whether a token opens an answer -> [n, V] log-probabilities of those that do."""
    return logits[first].log_softmax(-1)


def surrogate(logp: torch.Tensor) -> torch.Tensor:
    """[n, K] log-probabilities -> log K + the mean of their entropies - the entropy of their mean."""
    p = logp.exp()
    mean = p.mean(0)
    together = -(mean * mean.clamp(min=1e-12).log()).sum()
    return math.log(logp.shape[1]) - (p * logp).sum(-1).mean() - together
