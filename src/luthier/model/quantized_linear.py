"""Linear modules whose weight lies in codes, and where they stand in a network.

A `Quantized` module holds codes alone: its weight is made in the compute dtype when a layer is read, and made
again in its backward, so never more than one layer's weight exists. To everyone else it is the Linear (or
Conv1D) it stands for: `weight` is a property, and `open` gives a module a dense weight for a while (to merge
into it, say).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from luthier.methods.quantizers._base import Codes, Quantizer
from luthier.model.experts import Matrix, join, put

if TYPE_CHECKING:
    from luthier.model.network import Network


class Quantized(nn.Module):
    """A linear module whose weight lies in codes. Biases stay as they are."""

    # called with each gradient of the weight [out, in] in backward, which is not kept
    watch: Callable[[Tensor], Any] | None = None
    # the same where what is continuous in the codes is trained, too
    on_gradient: Callable[[Tensor], Any] | None = None
    bias: nn.Parameter | None
    compute: torch.dtype  # in which the weight is made
    size: tuple[int, int]  # out, in

    def _setup(self, base: Any, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.quantizer: Any = None
        self.slots: list[str] = []
        self.compute = dtype
        self._parameters["weight"] = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.register_parameter("bias", base.bias)
        self.train(base.training)

    # --- codes

    def take(self, quantizer: Quantizer, codes: Mapping[str, Tensor]) -> None:
        """From here on the weight lies in these codes."""
        self.quantizer = quantizer
        self.slots = sorted(codes)
        self._parameters.pop("weight", None)
        for name, value in codes.items():
            self.register_buffer(f"q_{name}", value, persistent=False)

    @property
    def codes(self) -> Codes:
        return {name: getattr(self, f"q_{name}") for name in self.slots}

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the codes stand for, as [out, in]."""
        return self.quantizer.dequantize(self.codes, self.size, dtype or self.compute)

    @property
    def stored(self) -> int:
        """Bytes of the codes."""
        return sum(codes.nbytes for codes in self.codes.values())

    # --- as others see it

    @property
    def weight(self) -> Any:
        dense = self._parameters.get("weight")
        if dense is None:
            dense = self.laid_out(self.dense())
        return dense

    def laid_out(self, W: Tensor) -> Tensor:
        """[out, in] as the module lays out its weight."""
        return W

    @contextmanager
    def open(self) -> Iterator[nn.Parameter]:
        """A dense weight of its own for a while: what is written into it is forgotten afterwards."""
        weight = nn.Parameter(self.laid_out(self.dense()).contiguous(), requires_grad=False)
        self._parameters["weight"] = weight
        try:
            yield weight
        finally:
            self._parameters.pop("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.quantizer is not None:
            x = self.quantizer.inputs(x, self.codes)
        if "weight" in self._parameters:
            return super().forward(x)
        if self.on_gradient is not None:
            return checkpoint(self._forward_trained, x, use_reentrant=False)
        anchor = None
        if self.watch is not None and torch.is_grad_enabled():
            anchor = x.new_zeros((), requires_grad=True)
        y = Product.apply(x, self, False, anchor)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y

    def _forward_trained(self, x: Tensor) -> Tensor:
        """Where what is continuous in the codes is trained: the gradient of the weight goes to them."""
        W, bias = self.dense(x.dtype), self.bias
        if W.requires_grad and self.on_gradient is not None:
            W.register_hook(self.on_gradient)
        if bias is not None:
            bias = bias.to(x.dtype)
        return F.linear(x, W, bias)

    def _apply(self, fn, recurse=True):
        """To another device or dtype: scales keep their precision, the weight is made in the new dtype."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, codes in before.items():
            now = self._buffers[name]
            if now is not None and codes is not None and now.dtype != codes.dtype:
                self._buffers[name] = codes.to(now.device)
        self.compute = fn(torch.empty(0, dtype=self.compute)).dtype
        return self


class QuantizedLinear(Quantized, nn.Linear):
    """Linear."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype):
        self._setup(base, dtype)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.size = (base.out_features, base.in_features)


class QuantizedConv1D(Quantized, Conv1D):
    """GPT-2's linear module, which lays its weight out as [in, out]."""

    def __init__(self, base: Conv1D, dtype: torch.dtype):
        self._setup(base, dtype)
        self.nf, self.nx = base.nf, base.nx
        self.size = (base.nf, base.nx)

    def laid_out(self, W):
        return W.T


class QuantizedMatrix(Quantized, Matrix):
    """One matrix of one expert."""

    def __init__(self, base: Matrix, dtype: torch.dtype):
        self._setup(base, dtype)
        self.size = base.size


class Product(torch.autograd.Function):
    """x W' (or, transposed, x W) for a module's weight, which is made where it is needed, and not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, module: Quantized, transposed: bool = False, anchor: Tensor | None = None
    ) -> Tensor:
        """anchor: any tensor that requires a gradient, for x may not."""
        ctx.module, ctx.transposed = module, transposed
        if anchor is not None:
            ctx.save_for_backward(x)
        W = module.dense(x.dtype)
        if transposed:
            W = W.T
        return F.linear(x, W)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        for x in ctx.saved_tensors:
            of_weight = grads[0].flatten(0, -2).T @ x.flatten(0, -2)
            ctx.module.watch(of_weight.float())
        grad = None
        if ctx.needs_input_grad[0]:
            grad = Product.apply(grads[0], ctx.module, not ctx.transposed)
        return grad, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return Product.apply(tangents[0], ctx.module, ctx.transposed)


# ---------------------------------------------------------------------------------------------- in a model


def modules(model: nn.Module) -> dict[str, Quantized]:
    """The quantized modules of a network."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Quantized)}


def numbers(model: nn.Module) -> int:
    """How many weights the codes of a network stand for."""
    return sum(m.size[0] * m.size[1] for m in modules(model).values() if "weight" not in m._parameters)


@contextmanager
def opened(some: Iterable[Any]) -> Iterator[None]:
    """Dense weights in those of these modules that are quantized, for a while."""
    with ExitStack() as stack:
        for module in some:
            if isinstance(module, Quantized) and "weight" not in module._parameters:
                stack.enter_context(module.open())
        yield


def quantized_module(base: Any, dtype: torch.dtype) -> Quantized:
    """The quantized module that can stand for a linear one, its weight still dense."""
    if isinstance(base, Matrix):
        return QuantizedMatrix(base, dtype)
    if isinstance(base, Conv1D):
        return QuantizedConv1D(base, dtype)
    return QuantizedLinear(base, dtype)


def plain(m: Quantized) -> nn.Module:
    """The module that a quantized one stands for, with the weight that it has."""
    if isinstance(m, Matrix):
        return Matrix(m.weight).train(m.training)
    with torch.device("meta"):
        if isinstance(m, Conv1D):
            module = Conv1D(m.nf, m.nx)
        else:
            module = nn.Linear(m.size[1], m.size[0], bias=m.bias is not None)
    W = m.weight
    if not isinstance(W, nn.Parameter):
        W = nn.Parameter(W.detach().contiguous(), requires_grad=False)
    module._parameters["weight"] = W
    module._parameters["bias"] = m.bias
    return module.train(m.training)


def open_up(model: nn.Module) -> None:
    """Plain modules again, for good."""
    for name, m in modules(model).items():
        put(model, name, plain(m))
    join(model)


def describe(model: Network) -> tuple[str, ...]:
    """Sentences on a quantized network: what it takes in memory, and what it would take; none of another."""
    coded = [m for m in modules(model).values() if "weight" not in m._parameters]
    if not coded:
        return ()
    count = sum(m.size[0] * m.size[1] for m in coded)
    stored = sum(m.stored for m in coded)
    dense = count * coded[0].compute.itemsize
    rest = sum(p.numel() * p.element_size() for p in model.parameters())
    sentences = [
        f"{len(coded)} linear weights are quantized to {coded[0].quantizer.name} at"
        f" {8 * stored / count:.2f} bits per weight: {stored / 2**20:,.0f} MB instead of"
        f" {dense / 2**20:,.0f}; the rest of the base takes {rest / 2**20:,.0f} MB"
    ]
    fused = [n for n, p in model.named_parameters() if p.ndim == 3 and ".experts" in n]
    if fused:
        sentences.append(
            f"{len(fused)} fused expert weights ({fused[0]}, ...) have a layout that cannot be"
            " quantized and keep their precision"
        )
    return tuple(sentences)
