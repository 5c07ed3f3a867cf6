"""The ensemble of several runs, beside which their soup is judged: the logits of all of them, averaged.

An ensemble costs one forward pass for each run, a soup one for all of them. In a run with `init_from: {merge:
average, of: [...]}` and `objective: null`, `loss` is the soup's and `ensemble_loss` that of the ensemble of
the same runs; where only the output layer was tuned, both are the same.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.evaluators._base import Evaluator, batches, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.model.load import tensors_of
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[Metric("ensemble_loss", "loss of the ensemble", better="lower")],
    paper="arXiv:2203.05482",
    row="model-soups",
    requires=[COMPLETIONS, LOGPROBS, TOPK],
    use_when="you ask whether an average of runs lost something against the ensemble that costs several times"
    " as much.",
    costs="one forward pass over the held-out rows for each run, and all logits of a batch for each.",
    covers="the loss of the logit ensemble of the same runs.",
    omits="the paper's closed-form approximation of the difference, and the error along lines between runs"
    " (merge with `average` or `wise` at several weights for that).",
    tests=["methods/evaluators/quality/test_ensemble.py::test_of_output_layers_the_soup_is_the_ensemble"],
)
class Ensemble(Evaluator):
    """`ensemble_loss`: mean -log p per supervised token under the mean of the runs' logits."""

    of: list[str]  # folders of the runs
    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        if when == "during":
            return {}
        policy = roles.policy
        members = []
        for i, name in enumerate(self.of):
            tensors = tensors_of(name, policy.attached)
            members.append(policy.as_role(f"ensemble {i}", partial(policy.attached.using, tensors)))
        loss, tokens = 0.0, 0
        for batch in batches(roles, liked(rows), self.batch_size):
            first, *rest = [member.outputs(batch) for member in members]
            logprobs = first.apply(mean_logits, first.labels, beside=rest)
            loss -= float(logprobs.double().sum())
            tokens += len(logprobs)
        return {"ensemble_loss": loss / tokens} if tokens else {}


def mean_logits(*tables: Tensor) -> Tensor:
    """Logits [C, V] of each run and labels [C] -> [C] log-probability of the labels under the mean logits."""
    *logits, labels = tables
    mean = torch.stack(logits).mean(0)
    return mean.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
