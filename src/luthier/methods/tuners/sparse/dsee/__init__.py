"""DSEE: M W + s B A + S, a low-rank and a sparse update of W, and after part of the run a mask M that keeps
only the larger entries of W.

S has `n_sparse` entries at positions where a low-rank part explains W least (greedy bilateral decomposition
of W itself). At the fraction `prune_at` of the run the entries of W with the smallest |W + s B A + S| are
removed for good, and A, B and S continue to train. Structured pruning: the output of every head and every
feed-forward unit is multiplied by a trainable coefficient, which starts at one and is pulled towards zero by
an L1 penalty; at `prune_at` those with the smallest coefficients are removed, the other coefficients stay.
`sliced` turns the rest into a smaller model, and so does a merged export. Departs: fractions are of each
module or layer separately, not of all; heads are removed in groups that share keys and values. During
training the mask takes one byte per entry, and is saved as such.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.methods.tuners._base import DISABLE_ADAPTER, FACTOR_B, MERGE
from luthier.methods.tuners._delta import Delta, frozen, oriented
from luthier.methods.tuners.sparse._sparse import add, place_type, smallest, some_of, spread
from luthier.model.anatomy import part_of
from luthier.registry import INTERNAL, Range, tuner

Share = Annotated[float, Field(ge=0, lt=1)]


@tuner(
    example={"r": 2},
    paper="arXiv:2111.00160",
    row="dsee",
    provides=[DISABLE_ADAPTER, MERGE, FACTOR_B],
    use_when="the tuned model is to be smaller as well: it learns a low-rank and a sparse update and"
    " prunes weights, heads or feed-forward units along the way.",
    costs="as LoRA of rank `r`, plus a mask of one byte a weight while training where `sparsity` is set.",
    starting_rate="start with that of `lora`.",
    default_rate=2e-4,
    covers="a sparse and a low-rank part, and heads and units that are taken out.",
    tests=[
        "methods/tuners/sparse/test_dsee.py::test_dsee",
        "methods/tuners/sparse/test_dsee.py::test_dsee_takes_heads_and_units_out",
        "methods/tuners/sparse/test_dsee.py::test_dsee_pulls_coefficients_and_is_written_small",
    ],
)
class DSEE(Delta):
    """Dually sparsity-embedded efficient tuning."""

    r: Annotated[int, Field(ge=1), Range(4, 64, log=True)] = 16  # rank of B A
    lora_alpha: float = 32  # scale of B A, before division by r
    n_sparse: Annotated[int, Field(ge=0)] = 64  # entries of S in each matrix
    # positions of S: where W is least low-rank, or random
    support: Literal["decompose", "random"] = "decompose"
    sparsity: Share = 0.0  # share of W's entries that is masked; 0: no mask
    # share of each layer's heads that is removed (the paper: 0.25); 0: heads have no coefficients
    head_sparsity: Share = 0.0
    # share of each layer's feed-forward units that is removed (the paper: 0.4); 0: units have none
    ffn_sparsity: Share = 0.0
    l1_weight: Annotated[float, Field(ge=0)] = 1e-4  # weight of the coefficients' absolute values in the loss
    prune_at: Annotated[float, Field(ge=0, le=1)] = 0.5  # when to prune, as a share of the run
    # heads of a layer, those that share keys and values as one; filled in when it is attached
    groups: Annotated[int, INTERNAL] = 0
    part: Annotated[str, INTERNAL] = ""  # what a module does in its layer; filled in for each

    @property
    def structured(self) -> bool:
        return bool(self.head_sparsity or self.ffn_sparsity)

    def at(self, name):
        return replace(self, part=part_of(name) or "") if self.structured else self

    def attach(self, model):
        from luthier.methods.tuners.sparse.dsee.tuned import DSEEModel

        return DSEEModel(self, model)

    def units(self, width: int) -> int:
        """How many coefficients a module has for its `width` columns, which read what heads or units say."""
        return (
            self.groups
            if self.part == "o" and self.head_sparsity
            else width
            if self.part == "down" and self.ffn_sparsity
            else 0
        )

    def init(self, W):
        n, scale = min(self.n_sparse, W.numel()), W.shape[1] ** -0.5
        if self.support == "decompose" and n:
            S = low_rank_and_sparse(W.float(), min(self.r, *W.shape), n)[2]
            places = S.abs().flatten().topk(n).indices
        else:
            places = some_of(W.numel(), n)
        tensors = {
            "A": torch.empty(self.r, W.shape[1]).uniform_(-scale, scale),
            "B": torch.zeros(W.shape[0], self.r),
            "indices": frozen(places.sort().values.to(place_type(W.numel()))),
            "values": torch.zeros(n),
        }
        if self.sparsity:
            tensors["mask"] = frozen(torch.ones(W.shape, dtype=torch.bool))
        if self.units(W.shape[1]):
            tensors["c"] = torch.ones(self.units(W.shape[1]))
        return tensors

    def change(self, W: Tensor, p) -> Tensor:
        """s B A + S."""
        return (p.B @ p.A * (self.lora_alpha / self.r) + spread(p.values, p.indices, W.shape)).to(W.dtype)

    def weight(self, W, p):
        tuned = (W * p.mask if self.sparsity else W) + self.change(W, p)
        return tuned * columns(p.c, W.shape[1]).to(W.dtype) if self.units(W.shape[1]) else tuned

    def forward(self, x, y, p, layer):
        if self.units(x.shape[-1]):
            scaled = x * columns(p.c, x.shape[-1])
            y, x = y + F.linear(scaled - x, oriented(layer).to(x.dtype)), scaled
        if self.sparsity:
            W = oriented(layer).to(x.dtype)
            y = y - x @ (W * ~p.mask).T if not p.mask.all() else y
        y = y + (x @ p.A.T) @ p.B.T * (self.lora_alpha / self.r)
        return add(x, y, p.values, p.indices) if len(p.values) else y

    @torch.no_grad()
    def prune(self, W: Tensor, p) -> None:
        """Take the smallest entries of the tuned weight out of W, as it is tuned now, and the least of heads
        or units out of all.
        """
        if self.sparsity:
            size = (W.float() + self.change(W.float(), p)).abs().flatten()
            p.mask.view(-1)[size.argsort()[: round(self.sparsity * size.numel())]] = False
        units = self.units(W.shape[1])
        if units:
            share = self.head_sparsity if self.part == "o" else self.ffn_sparsity
            p.c[smallest(p.c, min(round(share * units), units - 1))] = 0


def columns(c: Tensor, width: int) -> Tensor:
    """[units] -> [width], each unit's coefficient for the columns that read it."""
    return c.repeat_interleave(width // len(c))


def low_rank_and_sparse(W: Tensor, rank: int, k: int, rounds: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """W [out, in] ~ U V + S by alternating QR steps: U [out, rank], V [rank, in], S with k entries. The rank
    grows on the way.
    """
    S, V = torch.zeros_like(W), torch.empty(0, W.shape[1], device=W.device)
    grow, U = max(1, rank // 4), W.new_zeros(W.shape[0], 0)
    for _ in range(rounds):
        left = W - S
        if len(V) < rank:  # the main directions of what is not explained join
            more = min(grow, rank - len(V))
            V = torch.cat([V, torch.linalg.svd(left - U @ V, full_matrices=False)[2][:more]])
        U = torch.linalg.qr(left @ V.T)[0]
        V = U.T @ left
        rest = (W - U @ V).flatten()
        places = rest.abs().topk(k).indices
        S = torch.zeros_like(rest).index_copy_(0, places, rest[places]).view_as(W)
    return U, V, S
