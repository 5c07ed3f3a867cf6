"""Adafactor's rescaling: the gradient over the root of its mean square, which a matrix stores as one number
for each row and each column.

The mean square of an entry is (mean of its row) (mean of its column) / (mean of all), in running means whose
rate is step^-0.8; vectors store theirs in full. An update whose root mean square exceeds `clip_threshold` is
shortened to it. Tensors of three and more dimensions are treated as stacks of matrices. Departs: no momentum;
the paper's own learning rate, which falls with the root of the step, is left to the recipe's schedule; steps
in proportion to a tensor's size (`scale_parameter`) are off by default, as in transformers' Trainer.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.transforms._base import Each
from luthier.registry import transform


@transform(
    paper="arXiv:1804.04235",
    use_when="you write a chain of your own: it is the rescaling within optimizer `adafactor`.",
    costs="one fp32 number for each row and each column of a matrix, and for each number of a vector.",
    starting_rate="AdamW's; with `scale_parameter` about 1e-2.",
)
class Adafactor(Each):
    """g / sqrt(row x column / mean), shortened to a root mean square of clip_threshold."""

    rescales = True

    # the rate of the running means at a step is step to this power
    decay_rate: Annotated[float, Field(lt=0, ge=-1)] = -0.8
    clip_threshold: Annotated[float, Field(gt=0)] = 1.0  # largest root mean square of an update
    adafactor_epsilon: Annotated[float, Field(ge=0)] = 1e-30  # added to squared gradients
    scale_parameter: bool = False  # multiply the step by the tensor's root mean square
    least_scale: Annotated[float, Field(ge=0)] = 1e-3  # the least that it is multiplied by

    def init(self, like):
        if like.ndim < 2:
            return {"squares": torch.zeros_like(like)}
        return {"rows": like.new_zeros(like.shape[:-1]), "columns": like.new_zeros(_without_rows(like.shape))}

    def update(self, grad, state, param, step):
        # entries that a tuner has reset count their own steps; rows and columns have the oldest one's
        rate = float(torch.as_tensor(step).max()) ** self.decay_rate
        squares = grad.square().add_(self.adafactor_epsilon)
        if grad.ndim < 2:
            update = grad * state["squares"].lerp_(squares, rate).rsqrt()
        else:
            rows = state["rows"].lerp_(squares.mean(-1), rate)
            columns = state["columns"].lerp_(squares.mean(-2), rate)
            shares = rows / rows.mean(-1, keepdim=True)
            update = grad * shares.rsqrt()[..., None] * columns.rsqrt()[..., None, :]
        update /= (rms(update) / self.clip_threshold).clamp(min=1.0)
        if self.scale_parameter:
            update *= rms(param).clamp(min=self.least_scale)
        return update


def _without_rows(shape: torch.Size) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1])


def rms(x: Tensor) -> Tensor:
    """The root of the mean square of all numbers; 0 where there are none."""
    return torch.linalg.vector_norm(x) / max(x.numel(), 1) ** 0.5
