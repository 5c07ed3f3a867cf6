"""Compacter: bottleneck adapters whose two maps are sums of Kronecker products, W = sum over i up to
`phm_dim` of kron(A_i, s_i t_i).

The matrices A_i [n, n] are shared by all adapters of a network; s_i [out / n, rank] and t_i [rank, in / n]
belong to each map, so a map costs rank * (out + in) parameters instead of out * in. The adapters are placed
after attention and after the feed-forward block; with the latter alone they are the paper's Compacter++: name
its last modules as target_modules.

Departs: s of `up` starts at exactly zero (the paper: near it), the bottleneck is a multiple of n wide, and
norms stay frozen unless `modules_to_save` names them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners.adapters._bottleneck import NARROWER, Bottleneck
from luthier.registry import tuner


@tuner(
    paper="arXiv:2106.04647",
    row="compacter",
    provides=[DISABLE_ADAPTER],
    use_when="adapters are to be stored for many tasks and Houlsby's are too large: Kronecker products"
    " make each several times smaller.",
    costs="two small modules a layer, in training and in inference (not mergeable); the products are"
    " built at each forward pass.",
    starting_rate="start with that of `houlsby`; its recipe here takes five times as much on the same"
    " toy model.",
    default_rate=1e-3,
    covers="Kronecker sums with shared factors, behind attention and feed-forward.",
    omits="norms trained along by default (name them in `modules_to_save`); the paper's runs on GLUE.",
    tests=[
        "methods/tuners/adapters/test_compacter.py::test_compacter_is_its_kronecker_sums",
        "methods/tuners/adapters/test_compacter.py::test_compacter_learns_what_an_adapter_learns_with_few_numbers",
    ],
)
class Compacter(Bottleneck):
    """Two serial adapters per layer, of Kronecker products that share a factor."""

    places: ClassVar[tuple[str, ...]] = ("o", "down")

    # auto: the last linear modules of attention and of the feed-forward block
    target_modules: str | list[str] = "auto"
    # width of h divided by that of the bottleneck
    reduction_factor: Annotated[float, Field(ge=1), NARROWER] = 32
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "gelu"  # nonlinearity f
    # n: products in a sum, and the side of A_i; it must divide the width
    phm_dim: Annotated[int, Field(ge=1)] = 4
    phm_rank: Annotated[int, Field(ge=1)] = 1  # rank of s_i t_i
    phm_init_range: Annotated[float, Field(gt=0)] = 0.01  # initial standard deviation of A_i

    def put(self, model):
        from luthier.methods.tuners.adapters.compacter.tuned import CompacterModel

        return CompacterModel(self, model, "A")

    def widths(self, W):
        n, width = self.phm_dim, W.shape[0]
        if width % n:
            raise RecipeError(f"phm_dim: {n} does not divide the width of a module, {width}")
        return width, n * max(1, round(width / self.reduction_factor / n))

    def init(self, W):
        n, r, (width, k) = self.phm_dim, self.phm_rank, self.widths(W)
        return {
            "A": torch.randn(n, n, n) * self.phm_init_range,
            "down_s": glorot(n, k // n, r),
            "down_t": glorot(n, r, width // n),
            "down_bias": torch.zeros(k),
            "up_s": torch.zeros(n, width // n, r),
            "up_t": glorot(n, r, k // n),
            "up_bias": torch.zeros(width),
        }

    def maps(self, p):
        return kronecker(p.A, p.down_s @ p.down_t), kronecker(p.A, p.up_s @ p.up_t)


def kronecker(A: Tensor, B: Tensor) -> Tensor:
    """A [n, a, b] and B [n, c, d] -> the sum of kron(A_i, B_i), [a c, b d]."""
    return torch.einsum("iab,icd->acbd", A, B).reshape(A.shape[1] * B.shape[1], A.shape[2] * B.shape[2])


def glorot(*shape: int) -> Tensor:
    """[n, rows, columns], uniform."""
    bound = (6 / (shape[1] + shape[2])) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound)
