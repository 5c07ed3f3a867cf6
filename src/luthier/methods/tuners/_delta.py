"""A per-module tuner: its settings, `init`, `weight`, and optionally a cheaper `forward`.

The bridge (tuners/_peft/, reached by name because it imports this file) makes every Delta a PEFT type: a
config, a layer and a model that plain PEFT saves, loads and merges. Weights always have the shape [out, in],
however the module stores them: Linear, GPT-2's Conv1D, or an Embedding (out = width, in = vocabulary).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from luthier.methods.tuners._base import TunedModel, Tuner
from luthier.model.anatomy import layer_of
from luthier.model.linear import oriented
from luthier.registry import family

if TYPE_CHECKING:
    from luthier.model.network import Matrix, Network


class _AnyRMSNorm(type):
    def __instancecheck__(cls, module: Any) -> bool:
        return type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight")


class RMSNorm(metaclass=_AnyRMSNorm):
    """Any module of a class that is called RMSNorm, for `kinds`: each family of networks has its own."""


def norms_of(model: nn.Module, layers: Sequence[int] = ()) -> dict[str, Any]:
    """The norms of these layers by name; of a whole network where none are named."""
    norms = {}
    for name, module in model.named_modules():
        place = layer_of(f"{name}.")
        inside = not layers or (place is not None and place[1] in layers)
        if inside and isinstance(module, (nn.LayerNorm, RMSNorm)):
            norms[name] = module
    return norms


def frozen(tensor: Tensor) -> tuple[str, Tensor]:
    """A tensor of a layer that is saved and never trained."""
    return ("frozen", tensor)


def seeded(seed: int, *shape: int) -> tuple[str, Tensor]:
    """A standard normal matrix shared by all layers that ask for it and never saved: the seed is enough."""
    return ("seeded", _normal(seed, shape))


@lru_cache(maxsize=256)
def _normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@family
class TargetModules(Tuner):
    """Family: which modules of a network are tuned, with PEFT's settings."""

    on_quantized: ClassVar[bool] = True

    # suffixes of module names, one regular expression, or all-linear
    target_modules: str | list[str] = "all-linear"
    # suffixes of module names, or a regular expression, to leave unchanged
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None  # only these layers
    # name of the list of layers, if it is not layers, h, block or similar
    layers_pattern: str | list[str] | None = None
    # further modules that are fully trained and saved beside the adapter
    modules_to_save: list[str] | None = None
    # tokens whose rows of the embeddings are trained and saved beside the adapter: ids, or {module: ids}
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def only(self, layers: Sequence[int], of: int) -> dict[str, Any]:
        """The settings with which, of so many layers, all but the kept ones are left alone."""
        left = "|".join(str(i) for i in range(of) if i not in layers)
        return {"exclude_modules": rf"(.*\.)?(layers?|h|blocks?)\.({left})\..*"}


@family
class Delta(TargetModules):
    """Family: trainable tensors for each chosen module, and the tuned weight as a function of them and the
    original weight.
    """

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear, nn.Embedding)  # modules it can sit on, besides Conv1D
    # forward is given x and y in the adapter's fp32; else in the model's precision
    precise: ClassVar[bool] = True
    # what `start` learns from: "inputs", "covariance", "gradients" (model/calibration.py), or nothing
    reads: ClassVar[str] = ""

    def attach(self, model: Network) -> TunedModel:
        return import_module("luthier.methods.tuners._peft").attach(self, model)

    def at(self, name: str) -> Self:
        """These settings as they are for the module of this name, where modules differ."""
        return self

    def init(self, W: Tensor) -> dict[str, Any]:
        """W [out, in] -> the tensors that its layer gains, in fp32: trained, `frozen(...)` or `seeded(...)`.

        With them the layer must compute what it computed before.
        """
        raise NotImplementedError

    def weight(self, W: Tensor, p: SimpleNamespace) -> Tensor:
        """W [out, in] and the layer's tensors -> the tuned weight. p also has `watch` (tuners/_sparse.py)."""
        raise NotImplementedError

    def bias(self, b: Tensor | None, p: SimpleNamespace) -> Tensor | None:
        """[out] -> the tuned bias."""
        return b

    def forward(self, x: Tensor, y: Tensor, p: SimpleNamespace, layer: Matrix) -> Tensor:
        """x [..., in], the untuned output y [..., out] -> the tuned output. Override where W' need not be
        built.
        """
        b = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, self.weight(oriented(layer).to(x.dtype), p), self.bias(b, p))

    def entry_places(self, slot: str, p: SimpleNamespace) -> Tensor | None:
        """[n] where the numbers of a trained tensor are entries of W: their places in W.flatten()."""
        return None

    def enter(self, model: Network) -> None:
        """Make a network ready for this method, just before its layers are put in. Raises ValueError where it
        cannot be.
        """

    def prefix_kv(self, p: SimpleNamespace) -> tuple[Tensor, Tensor] | None:
        """Keys and values [m, width] that stand before those of every text, in methods that have them; asked
        by attention.
        """
        return None

    def start(self, W: Tensor, stats: Tensor) -> dict[str, Tensor]:
        """Better starting tensors of a layer, from the first `init_rows` rows: `stats` is what
        `reads` names.
        """
        raise NotImplementedError

    def factors(self, p: SimpleNamespace) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] with W' = W + B A, where the method has them: then its export as LoRA is
        exact.
        """
        return None
