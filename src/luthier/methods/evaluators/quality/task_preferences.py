"""Models for preferences over tasks that no run has trained: drawn from the posteriors of single tasks.

A preference w has a weight for each task, and they sum to 1. Its posterior has the means and the deviations
sum_i sum_j (w_i / m) of the m posteriors of every task, and each model drawn from the box that holds
1 - alpha of every number is one for it. Its score is the sum of w_i times the accuracy on task i (Lu et al.,
2023).

Departs: numbers are drawn each by itself, where the authors' code draws one place in the box for a whole
tensor; the box is that of the paper, while their code takes alpha where 1 - alpha is meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.estimators.first_order._posterior import Posterior, mixture, posterior_of, sample
from luthier.methods.evaluators._base import Evaluator, batches, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("preference_accuracy", "accuracy weighted by preferences", unit="%", better="higher"),
        Metric("equal_accuracy", "the same of one model for all preferences", unit="%", better="higher"),
    ],
    paper="arXiv:2310.02995",
    row="ibcl",
    requires=[COMPLETIONS, LOGPROBS, TOPK],
    use_when="each task has posteriors of estimator `variational`, and models are wanted for weights over"
    " tasks; plan `ibcl` sets it by itself.",
    costs="`samples` forward passes over the held-out rows for each preference, or one where it is 0.",
    covers="mixtures of posteriors by a preference, their boxes of probability 1 - alpha, the weighted"
    " accuracy of each preference and of one model for all.",
    omits="the hypervolume of the front, and the paper's baselines.",
    tests=[
        "methods/evaluators/quality/test_task_preferences.py::test_one_task_alone_is_its_posterior",
        "methods/evaluators/quality/test_task_preferences.py::test_samples_lie_in_the_box",
    ],
)
class TaskPreferences(Evaluator):
    """`preference_accuracy`, the mean over preferences, `preference_accuracy/W1,W2` of each, and
    `equal_accuracy`, that of the model with equal weights at the same preferences.
    """

    # folders of the runs of each task, one for each posterior
    posteriors: dict[str, list[str]] = field(default_factory=dict)
    preferences: list[list[float]] | None = None  # weights of the tasks; null: each task alone, and all alike
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.01  # probability outside of the box
    samples: Annotated[int, Field(ge=0)] = 0  # models drawn for each preference; 0: the mean
    column: str = "source"  # column that names the task of a row
    batch_size: Annotated[int, Field(ge=1)] | None = None  # rows read at once; by default as many as fit

    def __post_init__(self):
        for weights in self.preferences or ():
            if len(weights) != len(self.posteriors):
                raise RecipeError(
                    f"evaluator 'task_preferences': preference {weights} has {len(weights)} weights for"
                    f" {len(self.posteriors)} tasks"
                )
            if min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
                raise RecipeError(
                    f"evaluator 'task_preferences': the weights {weights} are not negative and sum to 1"
                )

    @torch.no_grad()
    def run(self, roles, rows, folder, when):
        rows = [row for row in liked(rows) if str(row.get(self.column)) in self.posteriors]
        if when != "after":
            return {}
        missing = [name for name in self.posteriors if all(str(row[self.column]) != name for row in rows)]
        if missing:
            roles.warn(
                "evaluator 'task_preferences' measures nothing: no held-out row is of task"
                f" {', '.join(missing)} (column '{self.column}')"
            )
            return {}
        count = len(self.posteriors)
        equal = [1 / count] * count
        chosen = self.preferences or [*torch.eye(count).tolist(), equal]
        shared = self.accuracies(roles, rows, self.posterior(equal).mean)
        metrics, own, others = {}, [], []
        for number, weights in enumerate(chosen):
            scores = []
            for tensors in self.models(roles, weights, number):
                scores.append(weighted(self.accuracies(roles, rows, tensors), weights))
            own.append(sum(scores) / len(scores))
            others.append(weighted(shared, weights))
            name = ",".join(f"{weight:.2f}" for weight in weights)
            metrics[f"preference_accuracy/{name}"] = own[-1]
        metrics["preference_accuracy"] = sum(own) / len(own)
        metrics["equal_accuracy"] = sum(others) / len(others)
        return metrics

    def posterior(self, weights: Sequence[float]) -> Posterior:
        """The posterior of a preference. Raises RecipeError where a run has left none."""
        posteriors, shares = [], []
        for folders, weight in zip(self.posteriors.values(), weights, strict=True):
            for folder in folders:
                one = posterior_of(folder)
                if one is None:
                    raise RecipeError(f"evaluator 'task_preferences': {folder} has no checkpoint")
                posteriors.append(one)
                shares.append(weight / len(folders))
        return mixture(posteriors, shares)

    def models(self, roles: Any, weights: Sequence[float], number: int) -> Iterator[Mapping[str, Tensor]]:
        """Tensors of each model for the preference of this number."""
        posterior = self.posterior(weights)
        if not self.samples:
            yield posterior.mean
        for k in range(self.samples):
            rngs = {
                name: roles.clock.rng("task_preferences", number, k, name, at=0) for name in posterior.mean
            }
            yield sample(posterior, self.alpha, rngs)

    def accuracies(self, roles: Any, rows: Sequence[dict], tensors: Mapping[str, Tensor]) -> list[float]:
        """The accuracy on each task with these tensors."""
        right: dict[str, list[float]] = {name: [] for name in self.posteriors}
        attached = roles.policy.attached
        policy = roles.policy.as_role("preference", partial(attached.using, tensors))
        for batch in batches(roles, rows, self.batch_size):
            wrong = policy.outputs(batch).first() != batch.labels[batch.targets]
            for row, misses in zip(batch.rows, batch.sums(wrong.double()).tolist(), strict=True):
                right[str(row[self.column])].append(float(misses == 0))
        return [sum(values) / len(values) for values in right.values()]


def weighted(accuracies: Sequence[float], weights: Sequence[float]) -> float:
    """The accuracy of a preference."""
    return sum(a * w for a, w in zip(accuracies, weights, strict=True))
