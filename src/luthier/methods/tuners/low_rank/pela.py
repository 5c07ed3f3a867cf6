"""PELA: replaces every chosen matrix by the product of two narrow matrices, taken from its singular value
decomposition, and trains these.

W = B A of rank in * out / (compress_ratio * (in + out)), so that both together have 1 / compress_ratio of its
entries. First recover it against the full model (objective `pela`, with role `base` as teacher), then
fine-tune it on a task, or put any tuner on the merged model. Disabling the tuner gives the full model.
Departs: the full weight stays in memory during training.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field

from luthier.methods.tuners._base import DISABLE_ADAPTER, FACTOR_B, MERGE
from luthier.methods.tuners._delta import Delta, oriented
from luthier.registry import Range, tuner


@tuner(
    paper="arXiv:2310.10700",
    row="pela",
    provides=[DISABLE_ADAPTER, MERGE, FACTOR_B],
    contract={
        "starts_as_base": (
            "a low-rank matrix only approximates the original one; with compress_ratio near 0 they are equal"
        )
    },
    use_when="the model itself is to become smaller: every matrix is replaced by a product of two"
    " narrow ones, recovered against the full model and then tuned.",
    costs="the full weights stay in memory while the factors train; the merged model has 1 /"
    " `compress_ratio` of the matrices' parameters.",
    default_rate=2e-4,
)
class PELA(Delta):
    """x A^T B^T + b instead of x W^T + b."""

    # entries of a matrix divided by those of the two that replace it
    compress_ratio: Annotated[float, Field(gt=0), Range(1.5, 4)] = 2.0

    def attach(self, model):
        from luthier.methods.tuners._peft import DeltaLayer, PeftTunedModel, config_for

        class Factored(PeftTunedModel):
            def drift(self):
                """BA - W [out, in] of each matrix, by way of its factors."""
                for layer in self.layers.values():
                    if isinstance(layer, DeltaLayer):
                        p = layer.tensors(layer.active_adapters[0])
                        yield p.B @ p.A - oriented(layer.get_base_layer()).detach().float()

        return Factored(self, model, config_for(self, model))

    def rank(self, wide: int, high: int) -> int:
        """Of a matrix [high, wide]."""
        return max(1, min(wide, high, int(wide * high / (self.compress_ratio * (wide + high)))))

    def init(self, W):
        U, S, V = torch.linalg.svd(W.float(), full_matrices=False)
        k = self.rank(*W.shape)
        root = S[:k].sqrt()
        return {"A": root[:, None] * V[:k], "B": U[:, :k] * root}

    def weight(self, W, p):
        return (p.B @ p.A).to(W.dtype)

    def forward(self, x, y, p, layer):
        b = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(F.linear(x, p.A), p.B, b)
