"""Linear modules of a network: torch's Linear and GPT-2's Conv1D, which keeps its weight as [in, out]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from luthier.model.network import Matrix


def is_transposed(module: nn.Module) -> bool:
    """Does a module keep its weight as [in, out]?"""
    return isinstance(module, nn.Embedding) or any(c.__name__ == "Conv1D" for c in type(module).__mro__)


def oriented(module: Matrix) -> Tensor:
    """The weight of a module as [out, in] (a view); [width] for a norm."""
    return module.weight.T if is_transposed(module) else module.weight


def linear_modules(model: nn.Module) -> dict[str, Any]:
    """Every linear module of a network, by name."""
    from transformers.pytorch_utils import Conv1D

    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def base_layer(module: Any) -> Any:
    """The module that an adapter's layer wraps, or the module itself."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module
