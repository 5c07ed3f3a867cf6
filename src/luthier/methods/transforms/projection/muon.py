"""Muon: the momentum of a matrix with all its singular values made equal, so that rare directions are stepped
as far as common ones.

The momentum U S V' becomes about U V' by five steps of a polynomial (Newton-Schulz), without a singular value
decomposition; its singular values then lie between 0.7 and 1.2. Only matrices in layers are made orthogonal:
embeddings, head and vectors go to `inner`. Departs: the polynomial is computed in fp32 on CPUs, in bf16 on
GPUs; scale `adamw` (Moonshot's, arXiv:2502.16982) gives updates the size of AdamW's, so that its learning
rates apply and `inner` may be adam at the same rate; scale `shape` is the first author's.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.transforms._base import Transform, apply_chain
from luthier.methods.tuners._base import ParamGroup
from luthier.registry import nested_list, transform

IN_LAYER = re.compile(r"\.\d+\.")
POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5, whose slope at 0 is as steep as may be


@transform(
    paper="arXiv:2502.16982",
    use_when="you write a chain of your own: it is the step within optimizer `muon`.",
    costs="one fp32 number for each weight of a matrix, and fifteen small matrix products a step.",
    starting_rate="AdamW's with scale `adamw`.",
)
class Muon(Transform):
    """Orthogonalised momentum."""

    rescales = True

    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95  # share of the old momentum
    nesterov: bool = True  # Nesterov momentum
    ns_steps: Annotated[int, Field(ge=1)] = 5  # steps of the polynomial
    # what the orthogonal matrix is multiplied by: 0.2 sqrt(longer side), or sqrt(max(1, rows / columns))
    scale: Literal["adamw", "shape"] = "adamw"
    # transforms of all that is not made orthogonal
    inner: Annotated[tuple[Any, ...], nested_list("transform")] = ("adam",)

    def apply(self, grads, state, group, step):
        updates, others = {}, {}
        in_layer = IN_LAYER.search(f"{group.name}.") is not None
        for slot, grad in grads.items():
            if not in_layer or grad.ndim != 2:
                others[slot] = grad
                continue
            own = state.setdefault("momentum", {})
            if slot not in own:
                own[slot] = torch.zeros_like(grad)
            m = own[slot].lerp_(grad, 1 - self.muon_momentum)
            direction = grad.lerp(m, self.muon_momentum) if self.nesterov else m
            updates[slot] = self.factor(grad.shape) * orthogonal(direction, self.ns_steps)
        if others:
            rest = ParamGroup(group.name, {k: group.params[k] for k in others}, group.by)
            updates |= apply_chain(self.inner, others, state.setdefault("inner", {}), rest, step)
        return {slot: updates[slot] for slot in grads}

    def factor(self, shape: torch.Size) -> float:
        """What an orthogonal matrix of this shape is multiplied by."""
        if self.scale == "adamw":
            return 0.2 * math.sqrt(max(shape))
        return math.sqrt(max(1.0, shape[0] / shape[1]))


def orthogonal(M: Tensor, steps: int) -> Tensor:
    """[m, n] of the same singular vectors, all singular values near 1; zero stays zero."""
    a, b, c = POLYNOMIAL
    X = M.float() if M.is_cpu else M.bfloat16()
    wide = M.shape[0] <= M.shape[1]
    if not wide:
        X = X.T
    X = X / (torch.linalg.vector_norm(X) + 1e-7)
    for _ in range(steps):
        XX = X @ X.T
        X = a * X + (b * XX + c * XX @ XX) @ X
    if not wide:
        X = X.T
    return X.to(M.dtype)
