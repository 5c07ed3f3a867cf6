"""What the logits of a classification head say of labels, as log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.kernels.logprobs import Head
from luthier.model.batch import Batch
from luthier.model.outputs import Outputs

# transformers' words for `problem_type`
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
Problem = Literal["auto", "single_label_classification", "multi_label_classification", "regression"]


def problem_of(config: Any) -> str:
    """What a network's config says that its head is for; one class where it says nothing."""
    return getattr(config, "problem_type", None) or SINGLE


def numbers_of(row: dict) -> list[float]:
    """The measurements of a row of a regression, one for each output. Raises ValueError."""
    label = row.get("label")
    values = label if isinstance(label, (list, tuple)) else [label]
    numbers = []
    for value in values:
        try:
            number = float(value)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"label {value!r} is not a number")
        numbers.append(number)
    return numbers


def outputs_of(logits: Tensor, problem: str, batch: Batch) -> Outputs:
    """logits [T, classes] that each supervised place of the batch is asked of."""
    labels = batch.labels[batch.targets]
    if problem == SINGLE:
        return Outputs(logits, Head(nn.Identity()), labels)
    own = logits.gather(1, batch.place[:, None])  # the place in its sequence is the number of the label
    if problem == MULTI:  # no has the logit 0
        return Outputs(torch.cat([torch.zeros_like(own), own], 1), Head(nn.Identity()), labels)
    targets: list[float] = []
    for group in batch.group.tolist():
        targets += numbers_of(batch.rows[group])
    return Numbers(own, torch.tensor(targets, device=logits.device))


class Numbers(Outputs):
    """A regression: numbers [T], and what they should be."""

    def __init__(self, values: Tensor, targets: Tensor):
        super().__init__(values, Head(nn.Identity()), torch.zeros_like(targets, dtype=torch.long))
        self.values, self.targets = values.squeeze(1), targets

    @cached_property
    def logprobs(self) -> Tensor:
        """[T] minus the squared error: of a normal distribution of variance 1/2, without its constant."""
        return -(self.values - self.targets).square()

    def apply(self, f: Callable, *per_token: Tensor, beside: Any = ()) -> Any:
        raise RecipeError(
            "a regression gives numbers, and not a choice among classes: leave out what asks for its"
            " alternatives (accuracy, calibration, label smoothing)"
        )
