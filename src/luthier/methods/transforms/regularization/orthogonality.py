"""Orthogonality: keeps the rows of A and the columns of B of a low-rank tuner near orthonormal, as AdaLoRA
needs.

Adds the gradient of weight * (|A A' - 1|^2 + |B' B - 1|^2) to theirs, which equals adding the term to the
loss, whatever the gradient accumulation. Place it before the rescaling: `optim: [orthogonality, clip, adam]`.
Departs from PEFT's AdaLoRA, which uses the norms without the square (the paper has it), and their mean over
all matrices.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.transforms._base import Transform
from luthier.registry import Range, transform


@transform(
    paper="arXiv:2303.10512",
    use_when="tuner is `adalora`, whose ranks should stay near orthogonal.",
    costs="two small matrix products for each module and step.",
    starting_rate="that of `adalora`.",
)
class Orthogonality(Transform):
    """A pull of A A' and B' B towards the identity; other tensors pass unchanged."""

    # weight of the term beside the loss (orth_reg_weight in PEFT)
    weight: Annotated[float, Field(ge=0), Range(0.01, 1.0, log=True)] = 0.5

    def apply(self, grads, state, group, step):
        if not {"A", "B"} <= grads.keys():
            return grads
        a, b = group.params["A"], group.params["B"]
        by_b = pull(b.mT).mT
        return {**grads, "A": grads["A"] + self.weight * pull(a), "B": grads["B"] + self.weight * by_b}


@torch.no_grad()
def pull(rows: Tensor) -> Tensor:
    """The gradient of |R R' - 1|^2 with respect to R [..., r, n]."""
    return 4 * (rows @ rows.mT - torch.eye(rows.shape[-2], device=rows.device, dtype=rows.dtype)) @ rows
