"""LQ-LoRA's base: decomposes W into a NormalFloat part of few bits and a low-rank part, and distributes the
bits over the matrices by an integer program.

In turn, L1 L2 is the best rank-r approximation of the residual of Q, and Q quantizes the residual of L1 L2,
until the error rises. The format of each matrix's Q is chosen among the allowed ones by an integer program:
the least sum of errors within `target_bits` on average (scipy's milp). With `fisher` errors are weighted by
the rows and columns of the squared gradients of -log p of single rows. Use tuner `{name: lora, r: rank,
init_lora_weights: lq}` to train L1 and L2 themselves, as the paper does; any other tuner starts from Q + L1
L2.

Departs from the paper: errors of the formats are measured after one iteration; twelve of the paper's 432
formats are considered unless more are listed; magnitudes are stored in evenly spaced steps; the SVD is exact
where a side is at most 1024; L1 and L2 stay in the base, frozen, so that disabling the tuner gives what
training started from.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.quantizers._base import Codes, Quantizer
from luthier.methods.quantizers.normal_float.nf import NF
from luthier.registry import Range, quantizer

Bits = Literal[2, 3, 4, 8]


@quantizer(
    paper="arXiv:2311.12023",
    row="lq-lora",
    contract={"idempotent": "quantizing again splits the weights again, into another Q, L1 and L2"},
    use_when="you go below 4 bits a weight and want the adapter to start by repairing the quantization"
    " error, with `init_lora_weights: lq`.",
    costs="`target_bits` bits a weight on average plus the low-rank part; minutes of decompositions at"
    " the start for large models.",
    covers="errors that fall until they rise, weighted by Fisher information on request; bits allocated "
    "by an integer program; the low-rank part trained by tuner `lora`.",
    omits="the low-rank part without its copy: it stands in the base and, negated, beside the adapter, "
    "so that disabling the adapter gives the start; all 432 formats unless they are listed; 7B "
    "models.",
    tests=[
        "methods/quantizers/normal_float/test_lq_lora.py::test_lq_error_falls_until_it_stops_and_beats_plain_quantization",
        "methods/quantizers/normal_float/test_lq_lora.py::test_lq_of_a_matrix_of_that_rank_is_exact",
        "methods/quantizers/normal_float/test_lq_lora.py::test_lq_weights",
        "methods/quantizers/normal_float/test_lq_lora.py::test_bits_are_allocated_as_the_best_of_all_allocations",
        "methods/quantizers/normal_float/test_lq_lora.py::test_lq_keeps_its_budget_over_a_network_and_trains_its_low_rank_part",
    ],
)
class LQLoRA(Quantizer):
    """Low-rank plus quantized."""

    whole: ClassVar[bool] = True

    target_bits: Annotated[float, Field(gt=0)] = 2.75  # average bits per weight of Q over all matrices
    rank: Annotated[int, Range(8, 128, log=True), Field(ge=1)] = 64  # rank of L1 L2
    num_iters: Annotated[int, Field(ge=1)] = 100  # maximum iterations
    fisher: bool = False  # weight errors by squared gradients on the first rows
    init_rows: int = 32  # rows whose gradients are squared
    # formats of Q that the program may choose from: see quantizer nf
    num_bits_0: tuple[Bits, ...] = (2, 3, 4, 8)
    num_bits_1: tuple[Bits, ...] = (8,)  # ... of blocks' magnitudes
    block_size_0: tuple[int, ...] = (16, 32, 64)  # ... weights of a block
    block_size_1: tuple[int, ...] = (256,)  # ... magnitudes that share a second scale
    # ... of the second scale
    second_dtype: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("float16",)

    @property
    def reads(self):
        return "fisher" if self.fisher else ""

    def forms(self) -> list[NF]:
        """Every form that Q may take."""
        grid = itertools.product(
            self.num_bits_0, self.num_bits_1, self.block_size_0, self.block_size_1, self.second_dtype
        )
        return [
            NF(num_bits_0=a, num_bits_1=b, block_size_0=c, block_size_1=d, second_dtype=e)
            for a, b, c, d, e in grid
        ]

    def plan(self, weights, stats):
        forms, errors, sizes, names, total = self.forms(), [], [], [], 0
        for name, W in weights():
            error = WeightedError(stats.get(name))
            left, shape = W - error.low(W, self.rank)[0], (W.shape[0], W.shape[1])
            errors.append([error(left - f.dequantize(f.quantize(left), shape, W.dtype)) for f in forms])
            sizes.append([f.bits(shape) * W.numel() for f in forms])
            names.append(name)
            total += W.numel()
        picked = allocate(errors, sizes, self.target_bits * total)
        return {n: self.alone(forms[i]) for n, i in zip(names, picked, strict=True)}

    def alone(self, form: NF) -> LQLoRA:
        """The same with one form to choose from."""
        return replace(self, **{k: (getattr(form, k),) for k in FORM})

    def quantize(self, W, stats=None):
        forms = self.forms()
        if len(forms) > 1:
            return self.plan(lambda: [("", W)], {"": stats})[""].quantize(W, stats)
        return self.turns(W.float(), forms[0], WeightedError(stats))[0]

    def turns(self, W: Tensor, form: NF, error: WeightedError) -> tuple[Codes, list[float]]:
        """Q and L1 L2 of a weight, and the error after each turn up to the one that was kept."""
        best, history = {}, []
        Q = torch.zeros_like(W)
        for _ in range(self.num_iters):
            product, L1, L2 = error.low(W - Q, self.rank)
            codes = form.quantize(W - product)
            Q = form.dequantize(codes, (W.shape[0], W.shape[1]), W.dtype)
            now = error(W - Q - product)
            if history and now >= history[-1]:
                break
            best, history = {**codes, "L1": L1, "L2": L2}, [*history, now]
        return best, history

    def dequantize(self, codes, shape, dtype):
        Q = self.forms()[0].dequantize(codes, shape, torch.float32)
        return torch.addmm(Q, codes["L1"], codes["L2"]).to(dtype)

    def bits(self, shape):
        """Q's, and those of L1 and L2 in fp32."""
        low = 32 * min(self.rank, *shape) * sum(shape) / (shape[0] * shape[1])
        return (
            min(
                (f.bits(shape) for f in self.forms()),
                key=lambda b: (b > self.target_bits, abs(b - self.target_bits)),
            )
            + low
        )


FORM = ("num_bits_0", "num_bits_1", "block_size_0", "block_size_1", "second_dtype")
EXACT = 1024  # the smaller side up to which the SVD is exact


class WeightedError:
    """Errors in the weighted Frobenius norm ||D_r E D_c||; unweighted where no gradients were measured."""

    def __init__(self, moments: tuple[Tensor, Tensor] | None):
        """moments: the squared gradients' means over each row [out] and each column [in]."""
        self.scales = None if moments is None else [(m / m.mean()).clamp(min=1e-8).sqrt() for m in moments]

    def weigh(self, E: Tensor) -> Tensor:
        return E if self.scales is None else self.scales[0][:, None] * E * self.scales[1]

    def __call__(self, E: Tensor) -> float:
        return float(self.weigh(E).square().sum())

    def low(self, W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """[out, in] -> the nearest matrix of this rank, and its factors L1 [out, r] and L2 [r, in]."""
        r = min(rank, *W.shape)
        U, S, V = _svd(self.weigh(W), r)
        L1, L2 = U * S.sqrt(), (V * S.sqrt()).T
        if self.scales is not None:
            L1, L2 = L1 / self.scales[0][:, None], L2 / self.scales[1]
        return L1 @ L2, L1.contiguous(), L2.contiguous()


def _svd(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """[out, in] -> [out, r], [r], [in, r]."""
    if min(W.shape) <= EXACT:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :r], S[:r], Vh[:r].T
    start = torch.randn(W.shape[1], r + 16, generator=torch.Generator().manual_seed(0)).to(W)
    Y = torch.linalg.qr(W @ start)[0]
    for _ in range(4):
        Y = torch.linalg.qr(W @ (W.T @ Y))[0]
    U, S, Vh = torch.linalg.svd(Y.T @ W, full_matrices=False)
    return (Y @ U)[:, :r], S[:r], Vh[:r].T


def allocate(errors: list[list[float]], sizes: list[list[float]], budget: float) -> list[int]:
    """For each matrix the form that it takes, so that errors add up to least and sizes (in bits) to no more
    than the budget.
    """
    least = sum(min(s) for s in sizes)
    if least > budget * (1 + 1e-9):
        raise RecipeError(
            f"target_bits: the smallest formats take {least / budget:.2f} times as much; raise"
            " target_bits, or allow smaller formats"
        )
    if all(len(e) == 1 for e in errors):
        return [0] * len(errors)
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    cost, size = np.concatenate(errors), np.concatenate(sizes)
    owner = np.repeat(np.arange(len(errors)), [len(e) for e in errors])
    once = coo_array((np.ones(len(cost)), (owner, np.arange(len(cost)))))
    solution = milp(
        cost / max(cost.max(), 1e-30),
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(size[None] / budget, 0, 1)],
        options={"mip_rel_gap": 1e-6},
    )
    if solution.x is None:
        raise RuntimeError(f"the integer program of the bit allocation failed: {solution.message}")
    starts = np.concatenate([[0], np.cumsum([len(e) for e in errors])])
    return [int(solution.x[a:b].argmax()) for a, b in zip(starts[:-1], starts[1:], strict=True)]
