"""SM3: AdaGrad whose accumulators are one number for each row and each column of a matrix.

The accumulator of an entry is the smaller of its row's and its column's, plus its squared gradient; a row
keeps the largest of its entries', and so does a column (SM3-II). The step is the gradient over the root. The
trained entries of a sparse tuner (`spiel`, `apet`, `lt_sft`, ...) share the accumulators of the matrix that
they lie in, so the state does not depend on how many there are, and it outlives their exchange. Vectors have
an accumulator for each number, as in AdaGrad. Departs: tensors of three and more dimensions are treated as
matrices of their first dimension by all others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.transforms._base import Transform
from luthier.registry import INTERNAL, transform


@transform(
    paper="arXiv:1901.11150",
    row="spiel",
    use_when="Adam's state does not fit, or with tuner `spiel` and growth `ma`, as its paper does.",
    costs="one fp32 number for each row and each column of a matrix; with momentum one for each parameter.",
    starting_rate="that of AdaGrad: start at ten times AdamW's.",
    rate_factor=10.0,
    covers="SM3-II as a loop by hand computes it, on matrices and on sparse entries; with every entry "
    "trained, sparse SM3 is SM3 of the dense matrix.",
    tests=[
        "methods/transforms/adaptive/test_sm3.py::test_sm3_is_the_authors_sum",
        "methods/transforms/adaptive/test_sm3.py::test_sm3_of_all_entries_is_dense",
    ],
)
class SM3(Transform):
    """g / sqrt(min(row, column) + g^2 + eps)."""

    rescales = True

    sm3_epsilon: Annotated[float, Field(gt=0)] = 1e-8  # added under the root
    sm3_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the last update that is kept
    # what it is applied to; filled in when a run begins
    attached: Annotated[Any, INTERNAL] = None

    def bind(self, attached):
        return replace(self, attached=attached)

    def apply(self, grads, state, group, step):
        updates = {}
        for slot, grad in grads.items():
            own = state.setdefault(slot, {})
            squares = self.accumulate(grad, own, self.places(group.name, slot))
            update = grad * (squares + self.sm3_epsilon).rsqrt()
            if self.sm3_momentum:
                last = own.setdefault("update", torch.zeros_like(update))
                update = last.lerp_(update, 1 - self.sm3_momentum).clone()
            updates[slot] = update
        return updates

    def places(self, group: str, slot: str) -> tuple[Tensor, tuple[int, int]] | None:
        """Flat places of a tensor's numbers in a matrix, and its shape, where a tuner says so."""
        for component in getattr(self.attached, "components", ()):
            places = component.entry_places(group, slot)
            if places is not None:
                return places
        return None

    def accumulate(self, grad: Tensor, state: dict, places: Any) -> Tensor:
        """The accumulator of each number with this gradient in it. Rows [out, 1] and columns [1, in] have two
        dimensions, so that none has the shape of the entries.
        """
        if places is None and grad.ndim < 2:
            squares = state.setdefault("squares", torch.zeros_like(grad))
            return squares.addcmul_(grad, grad)
        if places is None:
            shape = (grad.shape[0], grad[0].numel())
        else:
            indices, shape = places
        if "rows" not in state:
            state["rows"], state["columns"] = grad.new_zeros(shape[0], 1), grad.new_zeros(1, shape[1])
        rows, columns = state["rows"], state["columns"]
        if places is None:
            squares = torch.minimum(rows, columns).addcmul(grad.reshape(shape), grad.reshape(shape))
            rows.copy_(squares.amax(1, keepdim=True))
            columns.copy_(squares.amax(0, keepdim=True))
            return squares.view(grad.shape)
        row, column = indices.long() // shape[1], indices.long() % shape[1]
        squares = torch.minimum(rows[row, 0], columns[0, column]).addcmul(grad, grad)
        rows[:, 0].scatter_reduce_(0, row, squares, "amax")
        columns[0].scatter_reduce_(0, column, squares, "amax")
        return squares
