"""A metric as the loss: 1 minus the accuracy, or the F1, of the likeliest tokens.

It is constant almost everywhere and has no gradient, so it is for estimators that compare values of the loss
(`mezo`): what is measured is what is trained. Since small perturbations often change no token, such an
estimator needs a larger `eps` and batch than with a likelihood. Tokens are read with the right ones before
them, as in training; objective `generated_reward` lets the model write.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.estimators._base import FORWARD_ONLY
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.registry import objective


@objective(
    requires=[COMPLETIONS, LOGPROBS, TOPK, FORWARD_ONLY],
    paper="arXiv:2305.17333",
    row="mezo",
    use_when="accuracy or F1 itself is to rise, likelihoods aside, and you use `mezo`.",
    costs="a forward pass over each row, and no backward pass.",
    starting_rate="that of `mezo`, with a larger `eps`.",
    covers="accuracy and F1 by hand; with `mezo` accuracy rises on a separable task, and so does F1.",
    tests=[
        "methods/objectives/metric/test_metric.py::test_a_metric_is_its_count_by_hand",
        "methods/estimators/zeroth_order/test_mezo.py::test_mezo_raises_a_metric",
    ],
)
class Metric(Objective):
    """1 - the metric of each completion."""

    unit = "sequence"

    # accuracy: all tokens right, or not; token_accuracy: share of right ones; f1: of the tokens, in any order
    of: Literal["accuracy", "token_accuracy", "f1"] = "accuracy"

    def loss(self, roles, batch):
        likeliest, labels = roles.policy.outputs(batch).first(), batch.labels[batch.targets]
        right = batch.means((likeliest == labels).float())
        if self.of == "accuracy":
            right = (right > 1 - 0.5 / batch.lengths.clamp(min=1)).float()
        if self.of == "f1":
            scores = []
            for i in range(len(batch.completion)):
                own = batch.owner == i
                scores.append(overlap(likeliest[own].tolist(), labels[own].tolist()))
            right = torch.tensor(scores, device=labels.device)
        return 1 - right


def overlap(one: list, other: list) -> float:
    """F1 of two bags of tokens: twice what they share, over what both have."""
    shared = sum((Counter(one) & Counter(other)).values())
    return 2 * shared / max(len(one) + len(other), 1)
