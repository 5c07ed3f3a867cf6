"""Linear modules of a network: torch's Linear and GPT-2's Conv1D, which keeps its weight as [in, out]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from luthier.model.network import Matrix


def is_transposed(module: nn.Module) -> bool:
    """Does a module keep its weight as [in, out]?"""
    if isinstance(module, nn.Embedding):
        return True
    return any(c.__name__ == "Conv1D" for c in type(module).__mro__)


def oriented(module: Matrix) -> Tensor:
    """The weight of a module as [out, in] (a view); [width] for a norm."""
    if is_transposed(module):
        return module.weight.T
    return module.weight


def linear_modules(model: nn.Module) -> dict[str, Any]:
    """Every linear module of a network, by name."""
    from transformers.pytorch_utils import Conv1D

    modules: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            modules[name] = module
    return modules


def uncalled_modules(model: nn.Module) -> list[str]:
    """Names of the linear modules whose weights a network reads without calling them, so that nothing can be
    measured or added there: the step sizes of selective state spaces (Mamba, Jamba).
    """
    names = []
    for name in linear_modules(model):
        mixer, _, leaf = name.rpartition(".")
        if leaf == "dt_proj" and hasattr(model.get_submodule(mixer), "A_log"):
            names.append(name)
    return names


def base_layer(module: Any) -> Any:
    """The module that an adapter's layer wraps, or the module itself."""
    if hasattr(module, "get_base_layer"):
        return module.get_base_layer()
    return module
