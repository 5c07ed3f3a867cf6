"""What the frozen weights of a base are kept in. A quantizer turns a weight into codes and codes into the
weight again.

`Quantized` modules hold codes alone: their weight is made in the compute dtype when a layer is read, and made
again in its backward, so never more than one layer's weight exists. To everyone else they are the Linear (or
Conv1D) they stand for: `weight` is a property, and `open` gives a module a dense weight for a while (to merge
into it, say).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from luthier.model.experts import Matrix, join, put
from luthier.registry import Capability, family

if TYPE_CHECKING:
    from luthier.model.network import Network

QUANTIZED_WEIGHTS = Capability(
    "quantized_weights",
    says="a quantized base whose scales or code books can be trained",
    advice="e.g. `quantization: {name: rtn, bits_per_weight: 2}`",
)

Codes = dict[str, Tensor]


@family
class Quantizer:
    """Family: settings that turn weights into codes."""

    # what the first rows tell it of each weight: "hessian" of its inputs, "fisher" information, or nothing
    reads: ClassVar[str] = ""
    whole: ClassVar[bool] = False  # must it see all weights before it decides about one?

    # ends of names of modules that stay as they are, besides the head and what is tied to it
    skip_modules: list[str] | None = None

    continuous: ClassVar[tuple[str, ...]] = ()  # which of the codes are numbers that could be trained

    @property
    def together(self) -> int:
        """How many weights side by side one code stands for."""
        return 1

    def plan(
        self, weights: Callable[[], Iterable[tuple[str, Tensor]]], seen: Mapping[str, Any]
    ) -> dict[str, Quantizer]:
        """weights(): (name, [out, in]) of all, one at a time; what rows told of each -> the quantizer of
        each.
        """
        return {name: self for name, _ in weights()}

    def quantize(self, W: Tensor, seen: Any = None) -> Codes:
        """[out, in] in fp32, and what rows told of it -> its codes, scales and so on, by name."""
        raise NotImplementedError

    def nearest(self, W: Tensor, codes: Codes) -> Codes:
        """Codes anew for W [out, in], the continuous ones as they are."""
        raise NotImplementedError(f"'{type(self).__name__}' has nothing continuous")

    def dequantize(self, codes: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The way back: [out, in] in dtype."""
        raise NotImplementedError

    def bits(self, shape: tuple[int, int]) -> float:
        """Bits that a weight of this shape takes, divided by its numbers: by formula."""
        raise NotImplementedError


class Quantized(nn.Module):
    """A linear module whose weight lies in codes. Biases stay as they are."""

    # called with each gradient of the weight [out, in] in backward, which is not kept
    watch: Callable[[Tensor], Any] | None = None
    # the same where what is continuous in the codes is trained, too
    heard: Callable[[Tensor], Any] | None = None
    bias: nn.Parameter | None
    compute: torch.dtype  # in which the weight is made
    size: tuple[int, int]  # out, in

    def _born(self, base: Any, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.quantizer: Any = None
        self.held: list[str] = []
        self.compute = dtype
        self._parameters["weight"] = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.register_parameter("bias", base.bias)
        self.train(base.training)

    # --- codes

    def take(self, quantizer: Quantizer, codes: Mapping[str, Tensor]) -> None:
        """From here on the weight lies in these codes."""
        self.quantizer, self.held = quantizer, sorted(codes)
        self._parameters.pop("weight", None)
        for name, value in codes.items():
            self.register_buffer(f"q_{name}", value, persistent=False)

    @property
    def codes(self) -> Codes:
        return {name: getattr(self, f"q_{name}") for name in self.held}

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the codes stand for, as [out, in]."""
        return self.quantizer.dequantize(self.codes, self.size, dtype or self.compute)

    @property
    def stored(self) -> int:
        """Bytes of the codes."""
        return sum(t.numel() * t.element_size() for t in self.codes.values())

    # --- as others see it

    @property
    def weight(self) -> Any:
        held = self._parameters.get("weight")
        return self.laid_out(self.dense()) if held is None else held

    def laid_out(self, W: Tensor) -> Tensor:
        """[out, in] as the module lays out its weight."""
        return W

    @contextmanager
    def open(self) -> Iterator[nn.Parameter]:
        """A dense weight of its own for a while: what is written into it is forgotten afterwards."""
        made = self._parameters["weight"] = nn.Parameter(
            self.laid_out(self.dense()).contiguous(), requires_grad=False
        )
        try:
            yield made
        finally:
            self._parameters.pop("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        if "weight" in self._parameters:
            return super().forward(x)
        if self.heard is not None:
            return checkpoint(self._listen, x, use_reentrant=False)
        watched = self.watch is not None and torch.is_grad_enabled()
        y = Product.apply(x, self, False, x.new_zeros((), requires_grad=True) if watched else None)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _listen(self, x: Tensor) -> Tensor:
        W = self.dense(x.dtype)
        if W.requires_grad and self.heard is not None:
            W.register_hook(self.heard)
        return F.linear(x, W, None if self.bias is None else self.bias.to(x.dtype))

    def _apply(self, fn, recurse=True):
        """To another device or dtype: scales keep their precision, the weight is made in the new dtype."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, was in kept.items():
            now = self._buffers[name]
            if now is not None and was is not None and now.dtype != was.dtype:
                self._buffers[name] = was.to(now.device)
        self.compute = fn(torch.empty(0, dtype=self.compute)).dtype
        return self


class QuantizedLinear(Quantized, nn.Linear):
    """Linear."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype):
        self._born(base, dtype)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.size = (base.out_features, base.in_features)


class QuantizedConv1D(Quantized, Conv1D):
    """GPT-2's linear module, which lays its weight out as [in, out]."""

    def __init__(self, base: Conv1D, dtype: torch.dtype):
        self._born(base, dtype)
        self.nf, self.nx = base.nf, base.nx
        self.size = (base.nf, base.nx)

    def laid_out(self, W):
        return W.T


class QuantizedMatrix(Quantized, Matrix):
    """One matrix of one expert."""

    def __init__(self, base: Matrix, dtype: torch.dtype):
        self._born(base, dtype)
        self.size = base.size


class Product(torch.autograd.Function):
    """x W' (or, turned, x W) for a module's weight, which is made anew wherever it is needed and never kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, module: Quantized, turned: bool = False, anchor: Tensor | None = None
    ) -> Tensor:
        """anchor: any tensor that requires a gradient, for x may not."""
        ctx.module, ctx.turned = module, turned
        ctx.save_for_backward(*([] if anchor is None else [x]))
        W = module.dense(x.dtype)
        return F.linear(x, W.T if turned else W)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        for x in ctx.saved_tensors:
            ctx.module.watch((grads[0].flatten(0, -2).T @ x.flatten(0, -2)).float())
        wants = ctx.needs_input_grad[0]
        return (Product.apply(grads[0], ctx.module, not ctx.turned) if wants else None), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return Product.apply(tangents[0], ctx.module, ctx.turned)


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
    entered = []
    try:
        for m in some:
            if isinstance(m, Quantized) and "weight" not in m._parameters:
                entered.append(m.open())
                entered[-1].__enter__()
        yield
    finally:
        for context in reversed(entered):
            context.__exit__(None, None, None)


def quantized_module(base: Any, dtype: torch.dtype) -> Quantized:
    """The quantized module that can stand for a linear one, its weight still dense."""
    if isinstance(base, Matrix):
        return QuantizedMatrix(base, dtype)
    return QuantizedConv1D(base, dtype) if isinstance(base, Conv1D) else QuantizedLinear(base, dtype)


def plain(m: Quantized) -> nn.Module:
    """The module that a quantized one stands for, with the weight that it has."""
    if isinstance(m, Matrix):
        return Matrix(m.weight).train(m.training)
    with torch.device("meta"):
        made = (
            Conv1D(m.nf, m.nx)
            if isinstance(m, Conv1D)
            else nn.Linear(m.size[1], m.size[0], bias=m.bias is not None)
        )
    W = m.weight
    made._parameters["weight"] = (
        W if isinstance(W, nn.Parameter) else nn.Parameter(W.detach().contiguous(), requires_grad=False)
    )
    made._parameters["bias"] = m.bias
    return made.train(m.training)


def open_up(model: nn.Module) -> None:
    """Plain modules again, for good."""
    for name, m in modules(model).items():
        put(model, name, plain(m))
    join(model)


def told(model: Network) -> tuple[str, ...]:
    """What a person should know of a quantized network: what it takes, and what it would take."""
    some = [m for m in modules(model).values() if "weight" not in m._parameters]
    if not some:
        return ()
    count, stored = sum(m.size[0] * m.size[1] for m in some), sum(m.stored for m in some)
    rest = sum(p.numel() * p.element_size() for p in model.parameters())
    name = some[0].quantizer.name
    left = [n for n, p in model.named_parameters() if p.ndim == 3 and ".experts" in n]
    dense = (
        (
            (
                f"{len(left)} fused expert weights ({left[0]}, ...) have a form that is not quantized: they"
                " stay as they are"
            ),
        )
        if left
        else ()
    )
    return (
        (
            f"{len(some)} linear weights are kept as {name}, {8 * stored / count:.2f} bits a number:"
            f" {stored / 2**20:,.0f} MB in place of {count * some[0].compute.itemsize / 2**20:,.0f};"
            f" everything else of the base takes {rest / 2**20:,.0f} MB"
        ),
        *dense,
    )
