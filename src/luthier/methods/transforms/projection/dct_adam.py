"""DCT-AdamW's step: Adam on a few columns of the gradient in the basis of the discrete cosine transform, so
that its state has that many columns, and no singular value decomposition is needed.

A gradient [m, n], turned so that n is the shorter side, is multiplied by one fixed orthogonal matrix of
cosines; the `rank` columns of the largest norm are kept, and of the projector only their numbers are stored.
Every `update_proj_gap` steps they are chosen anew; moments of columns that stay go on, those of new ones
begin at zero (the rotation Q_old' Q_new of the paper, which for columns of one orthogonal matrix is just
that). Only matrices in layers are projected: embeddings, head, vectors and matrices no larger than `rank` go
through Adam as they are. With `error_feedback` what a projection leaves out is added to the next gradient,
for a full matrix of state. Departs: the columns are cosines of one frequency each (DCT-II); the error is kept
in fp32; FRUGAL, FIRA and Dion with this projector are not there.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.transforms._base import Transform
from luthier.methods.transforms.adaptive.adam import Adam
from luthier.registry import transform

IN_LAYER = re.compile(r"\.\d+\.")
FAST = 1024  # shorter side from which the transform is computed by FFT


@transform(
    paper="arXiv:2505.17967",
    row="dct-adamw",
    use_when="you write a chain of your own: it is the step within optimizer `dct_adamw`.",
    costs="two fp32 numbers for each row and chosen column of a matrix, and their numbers; one matrix of"
    " cosines for all matrices of one size.",
    starting_rate="that of AdamW on the same weights.",
    covers="one orthogonal matrix of cosines; the columns of the largest L1 or L2 norm, L2 being the best"
    " choice of all; reconstruction at full rank; moments that go on where columns stay; FFT and product"
    " alike; error feedback that loses nothing; state of 2 m r numbers and r indices.",
    omits="FRUGAL, FIRA and Dion with this projector; a quantised error.",
    tests=[
        "methods/transforms/projection/test_dct_adam.py::test_the_cosines_are_orthogonal_and_scipys",
        "methods/transforms/projection/test_dct_adam.py::test_columns_of_the_largest_norm_are_the_best_choice",
        "methods/transforms/projection/test_dct_adam.py::test_full_rank_is_adam_in_the_rotated_basis",
        "methods/transforms/projection/test_dct_adam.py::test_moments_go_on_where_columns_stay",
        "methods/transforms/projection/test_dct_adam.py::test_error_feedback_loses_nothing",
        "methods/transforms/projection/test_dct_adam.py::test_the_state_is_two_tall_matrices_and_indices",
    ],
)
class DCTAdam(Transform):
    """Adam in the chosen columns of G Q."""

    rescales = True

    rank: Annotated[int, Field(ge=1)] = 128  # columns that are kept
    update_proj_gap: Annotated[int, Field(ge=1)] = 1  # steps between two choices of columns
    ranking: Literal["l1", "l2"] = "l1"  # norm by which columns are chosen
    error_feedback: bool = False  # add what a step leaves out to the next gradient
    adam_beta1: float = 0.9  # decay rate of the mean
    adam_beta2: float = 0.999  # decay rate of the mean square
    adam_epsilon: float = 1e-8  # added to the denominator

    def apply(self, grads, state, group, step):
        updates = {}
        plain = Adam(adam_beta1=self.adam_beta1, adam_beta2=self.adam_beta2, adam_epsilon=self.adam_epsilon)
        in_layer = IN_LAYER.search(f"{group.name}.") is not None
        for slot, grad in grads.items():
            if in_layer and grad.ndim == 2 and min(grad.shape) > self.rank:
                own = state.setdefault(slot, {})
                tall = grad if grad.shape[0] >= grad.shape[1] else grad.T
                update = self.projected_step(tall, own, step)
                updates[slot] = update if tall is grad else update.T
                continue
            if slot not in state:
                state[slot] = plain.init(grad)
            updates[slot] = plain.update(grad, state[slot], group.params[slot], step)
        return updates

    def projected_step(self, G: Tensor, state: dict, step: int) -> Tensor:
        """[m, n] n <= m -> its update."""
        if self.error_feedback:
            G = G + state["error"] if "error" in state else G
        S = transformed(G)
        age = state["age"] = state.get("age", 0) + 1
        if (age - 1) % self.update_proj_gap == 0:
            self.choose(S, state)
        index = state["columns"].long()
        low = S[:, index]
        basis = cosines(G.shape[1], G.device, G.dtype)[:, index]
        if self.error_feedback:
            state["error"] = G - low @ basis.T
        m = state["m"].lerp_(low, 1 - self.adam_beta1)
        v = state["v"].mul_(self.adam_beta2).addcmul_(low, low, value=1 - self.adam_beta2)
        root = (v / (1 - self.adam_beta2**step)).sqrt_().add_(self.adam_epsilon)
        return (m / (1 - self.adam_beta1**step)).div_(root) @ basis.T

    def choose(self, S: Tensor, state: dict) -> None:
        """The columns of this gradient, and the moments in them."""
        norms = torch.linalg.vector_norm(S, 1 if self.ranking == "l1" else 2, dim=0)
        index = norms.topk(self.rank).indices.sort().values
        m, v = S.new_zeros(len(S), self.rank), S.new_zeros(len(S), self.rank)
        if "columns" in state:
            same = state["columns"].long()[:, None] == index[None]
            before, now = same.nonzero(as_tuple=True)
            m[:, now], v[:, now] = state["m"][:, before], state["v"][:, before]
        state |= {"columns": index.int(), "m": m, "v": v}


@lru_cache(maxsize=16)
def cosines(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[n, n] orthogonal; column k is a cosine that turns k / 2 times."""
    i = torch.arange(n, dtype=torch.float64)
    Q = math.sqrt(2 / n) * torch.cos(math.pi / n * (i[:, None] + 0.5) * i[None])
    Q[:, 0] = 1 / math.sqrt(n)
    return Q.to(device, dtype)


def transformed(G: Tensor) -> Tensor:
    """[m, n] -> G Q."""
    if G.shape[1] < FAST:
        return G @ cosines(G.shape[1], G.device, G.dtype)
    return by_fft(G)


def by_fft(G: Tensor) -> Tensor:
    """[m, n] -> G Q by one FFT of the same length (Makhoul's): even places first, odd ones backwards."""
    n = G.shape[1]
    k = torch.arange(n, device=G.device, dtype=torch.float32)
    turned = torch.fft.fft(torch.cat([G[:, ::2], G[:, 1::2].flip(1)], 1).float())
    S = (turned * torch.polar(torch.ones_like(k), -math.pi / (2 * n) * k)).real * math.sqrt(2 / n)
    S[:, 0] /= math.sqrt(2)
    return S.to(G.dtype)
