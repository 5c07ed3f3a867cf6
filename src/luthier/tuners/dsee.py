"""DSEE: M W + s B A + S. A low-rank and a sparse update of W, and after a while a mask M that keeps only W's larger part.

S has `n_sparse` entries at places where a low-rank part explains W least (greedy bilateral decomposition of W itself).
At `prune_at` of the run the smallest |W + s B A + S| are cut out of W for good, and A, B and S learn on. Departs: the
share is pruned in each module by itself, not over all. Heads and hidden units are not pruned as a whole (the paper's
structured variant). The mask is kept a byte for each entry while training, and saved so.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.method import Range, tuner
from luthier.tuners._delta import Delta, frozen, oriented
from luthier.tuners._sparse import add, place_type, some_of, spread


@tuner(paper="arXiv:2111.00160", row="dsee", gives="off merge")
class DSEE(Delta):
    """Dually sparsity-embedded efficient tuning."""

    r: Annotated[int, Field(ge=1), Range(4, 64, log=True)] = 16  # rank of B A
    lora_alpha: float = 32  # scale of B A, before division by r
    n_sparse: Annotated[int, Field(ge=0)] = 64  # entries of S in each matrix
    support: Literal["decompose", "random"] = "decompose"  # where they are: where W is least low-rank, or anywhere
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of W's entries that the mask takes out; 0: no mask
    prune_at: Annotated[float, Field(ge=0, le=1)] = 0.5  # when, as a share of the run

    def attach(self, model):
        from luthier.tuners._peft_sparse import Pruning

        return Pruning(self, model)

    def init(self, W):
        n, scale = min(self.n_sparse, W.numel()), W.shape[1] ** -0.5
        if self.support == "decompose" and n:
            S = low_rank_and_sparse(W.float(), min(self.r, *W.shape), n)[2]
            places = S.abs().flatten().topk(n).indices
        else:
            places = some_of(W.numel(), n)
        made = {
            "A": torch.empty(self.r, W.shape[1]).uniform_(-scale, scale),
            "B": torch.zeros(W.shape[0], self.r),
            "indices": frozen(places.sort().values.to(place_type(W.numel()))),
            "values": torch.zeros(n),
        }
        return made | ({"mask": frozen(torch.ones(W.shape, dtype=torch.bool))} if self.sparsity else {})

    def change(self, W: Tensor, p) -> Tensor:
        """s B A + S."""
        return (p.B @ p.A * (self.lora_alpha / self.r) + spread(p.values, p.indices, W.shape)).to(W.dtype)

    def weight(self, W, p):
        return (W * p.mask if self.sparsity else W) + self.change(W, p)

    def forward(self, x, y, p, layer):
        if self.sparsity:
            W = oriented(layer).to(x.dtype)
            y = y - x @ (W * ~p.mask).T if not p.mask.all() else y
        y = y + (x @ p.A.T) @ p.B.T * (self.lora_alpha / self.r)
        return add(x, y, p.values, p.indices) if len(p.values) else y

    @torch.no_grad()
    def prune(self, W: Tensor, p) -> None:
        """Take the smallest entries of the tuned weight out of W, as it is tuned now."""
        size = (W.float() + self.change(W.float(), p)).abs().flatten()
        p.mask.view(-1)[size.argsort()[: round(self.sparsity * size.numel())]] = False


def low_rank_and_sparse(W: Tensor, rank: int, k: int, rounds: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """W [out, in] ~ U V + S by alternating QR steps: U [out, rank], V [rank, in], S with k entries. The rank grows on the way."""
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
