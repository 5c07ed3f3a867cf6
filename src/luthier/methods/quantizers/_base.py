"""The kind's protocol: how the frozen weights of a base are stored. A quantizer turns a weight into codes and
codes into the weight again.

The modules that hold codes are in model/quantized_linear.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.registry import Capability, family

QUANTIZED_WEIGHTS = Capability(
    "quantized_weights",
    says="a quantized base whose scales or code books can be trained",
    advice="e.g. `quantization: {name: rtn, bits_per_weight: 2}`",
)

Codes = dict[str, Tensor]


@family
class Quantizer:
    """Family: settings that turn weights into codes."""

    # what the first rows tell it of each weight: "hessian" of its inputs, "fisher" information,
    # "input_maxima" of its inputs, or nothing
    reads: ClassVar[str] = ""
    whole: ClassVar[bool] = False  # must it see all weights before it decides about one?

    # ends of names of modules that are not quantized, besides the head and what is tied to it
    skip_modules: list[str] | None = None

    continuous: ClassVar[tuple[str, ...]] = ()  # which of the codes are numbers that could be trained

    @property
    def together(self) -> int:
        """How many weights side by side one code stands for."""
        return 1

    def plan(
        self, weights: Callable[[], Iterable[tuple[str, Tensor]]], statistics: Mapping[str, Any]
    ) -> dict[str, Quantizer]:
        """weights(): (name, [out, in]) of all, one at a time; what rows told of each -> the quantizer of
        each.
        """
        return {name: self for name, _ in weights()}

    def quantize(self, W: Tensor, statistics: Any = None) -> Codes:
        """[out, in] in fp32, and what rows told of it -> its codes, scales and so on, by name."""
        raise NotImplementedError

    def nearest(self, W: Tensor, codes: Codes) -> Codes:
        """Codes anew for W [out, in], the continuous ones as they are."""
        raise NotImplementedError(f"quantizer '{type(self).__name__}' has no continuous parameters")

    def dequantize(self, codes: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The way back: [out, in] in dtype."""
        raise NotImplementedError

    def inputs(self, x: Tensor, codes: Mapping[str, Tensor]) -> Tensor:
        """x [..., in] as the weight reads it; quantizers of inputs round it here."""
        return x

    def bits(self, shape: tuple[int, int]) -> float:
        """Bits that a weight of this shape takes, divided by its numbers: by formula."""
        raise NotImplementedError
