"""A module with one or several Deltas, as a PEFT layer, and the PEFT model class that inserts it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from luthier.methods.tuners._delta import Delta, oriented
from luthier.model.quantized_linear import Quantized
from luthier.registry import provides_of

if TYPE_CHECKING:
    from luthier.model.network import Matrix, Network

ADAPTER = "default"
INITIAL = "luthier_initial"  # a frozen second adapter: minus what the first one starts with
SIDEWAYS = (Conv1D, nn.Embedding)  # modules that keep their weight as [in, out]


class DeltaParams(nn.Module):
    """The tensors of one adapter on one layer, in fp32 whatever the base is; integers and booleans keep their
    type.
    """

    watch: Any = None  # called with the gradient of the tuned weight [out, in], by forwards that form it

    def __init__(self, tensors: Mapping[str, Any]):
        super().__init__()
        for name, value in tensors.items():
            if isinstance(value, tuple):
                buffer = value[1].float() if value[1].is_floating_point() else value[1]
                self.register_buffer(name, buffer.contiguous(), persistent=value[0] == "frozen")
            else:
                setattr(self, name, nn.Parameter(value.float().contiguous()))


class DeltaLayer(nn.Module, BaseTunerLayer):
    """A module with one or several Deltas."""

    slot: str  # "luthier_ssf_tensors": the attribute that holds adapter name -> DeltaParams
    other_param_names: tuple[str, ...] = ("methods",)

    def __init__(self, base: nn.Module, adapter: str, config: Any, name: str = ""):
        nn.Module.__init__(self)
        self.base_layer, self.methods, self._undo = base, {}, []
        self._disable_adapters, self.merged_adapters, self._active_adapter = False, [], adapter
        setattr(self, self.slot, nn.ModuleDict())
        self.update_layer(adapter, config, name)

    @property
    def adapter_params(self) -> nn.ModuleDict:
        return getattr(self, self.slot)

    def get_base_layer(self) -> Matrix:
        return cast("Matrix", super().get_base_layer())

    def update_layer(self, adapter: str, config: Any, name: str = "") -> None:
        """Add an adapter. name: of this module in the network."""
        method = config.settings().at(name)
        base = self.get_base_layer()
        fits = isinstance(base, (*method.kinds, Conv1D)) and base.weight.is_floating_point()
        if not fits or base.weight.ndim > 2:
            raise ValueError(f"tuner '{method.name}' does not support modules of type {type(base).__name__}")
        self.methods[adapter] = method
        self.adapter_params[adapter] = DeltaParams(method.init(oriented(base).detach()))
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        device = device or self.get_base_layer().weight.device
        if device.type != "meta" and not any(
            p.is_meta for p in self.adapter_params[adapter_name].parameters()
        ):
            self.adapter_params[adapter_name].to(device)

    def tensors(self, adapter: str) -> SimpleNamespace:
        """What a Delta calls p."""
        params = self.adapter_params[adapter]
        return SimpleNamespace(**params._parameters, **params._buffers, watch=params.watch)

    def prefix_kv(self) -> tuple[Tensor, Tensor] | None:
        """What kernels/attention.py puts before the keys and values of the attention that this module is a
        part of.
        """
        if self.disable_adapters or self.merged:
            return None
        prefixes = [
            self.methods[a].prefix_kv(self.tensors(a))
            for a in self.active_adapters
            if a in self.adapter_params
        ]
        present = [both for both in prefixes if both is not None]
        return (torch.cat([k for k, _ in present]), torch.cat([v for _, v in present])) if present else None

    def tuned(self, adapter: str) -> tuple[Tensor, Tensor | None]:
        """The tuned weight [out, in] and bias, in fp32."""
        base, p, method = self.get_base_layer(), self.tensors(adapter), self.methods[adapter]
        b = getattr(base, "bias", None)
        return method.weight(oriented(base).float(), p), method.bias(None if b is None else b.float(), p)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W, laid out as the module lays out its weight."""
        base = self.get_base_layer()
        delta = self.tuned(adapter)[0] - oriented(base).float()
        return delta.T if isinstance(base, SIDEWAYS) else delta

    def supports_lora_conversion(self, adapter_name: str = ADAPTER) -> bool:
        """True where the weight alone changes."""
        return (
            "merge" in provides_of(self.methods[adapter_name])
            and type(self.methods[adapter_name]).bias is Delta.bias
            and self.get_base_layer().weight.ndim == 2
        )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if isinstance(base, Quantized) and "weight" not in base._parameters:
            raise ValueError(
                "a quantized weight cannot be changed in place; dequantize the module first"
                " (luthier.quantizers)"
            )
        for adapter in check_adapters_to_merge(self, adapter_names) or []:
            if adapter not in self.adapter_params:
                continue
            method = self.methods[adapter]
            if "merge" not in provides_of(method):
                raise NotImplementedError(
                    f"tuner '{method.name}' computes beside the weights and cannot be merged into them; keep"
                    " the adapter, or take it off with unload()"
                )
            weight, bias = self._tuned_beside_merged(adapter) if self._undo else self.tuned(adapter)
            finite = weight.isfinite().all() and (bias is None or bias.isfinite().all())
            if safe_merge and not finite:
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken"
                )
            old = getattr(base, "bias", None)
            if bias is not None and old is None:
                warnings.warn(
                    f"merging tuner '{method.name}' gives modules a bias that they had not: save_pretrained"
                    " writes it, and networks whose config has no biases do not read it",
                    stacklevel=2,
                )
            self._undo.append((base.weight.data, old))
            weight = weight.T if isinstance(base, SIDEWAYS) else weight
            base.weight.data = weight.to(base.weight.dtype).contiguous()
            if bias is not None:
                base.bias = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)
            self.merged_adapters.append(adapter)

    def _tuned_beside_merged(self, adapter: str) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and bias where other adapters are merged already: changes add up, as those of
        several active adapters do in `forward`.
        """
        base: Any = self.get_base_layer()
        merged, merged_bias = base.weight.data, getattr(base, "bias", None)
        now = oriented(base).detach().float()
        base.weight.data, bias_of_base = self._undo[0]
        if merged_bias is not None:
            base.bias = bias_of_base
        try:
            weight, bias = self.tuned(adapter)
            weight = now + weight - oriented(base).detach().float()
        finally:
            base.weight.data = merged
            if merged_bias is not None:
                base.bias = merged_bias
        if merged_bias is None or bias is None:
            return weight, bias
        return weight, merged_bias.float() + bias - (0.0 if bias_of_base is None else bias_of_base.float())

    def unmerge(self) -> None:
        base = self.get_base_layer()
        while self.merged_adapters:
            self.merged_adapters.pop()
            base.weight.data, old = self._undo.pop()
            if old is not None or getattr(base, "bias", None) is not None:
                base.bias = old

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        live = [a for a in self.active_adapters if a in self.adapter_params]
        if len(live) == 1:
            return self.update(live[0], x, y)
        return y + sum((self.update(a, x, y) - y for a in live), torch.zeros_like(y))

    def update(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Computed in the adapter's precision unless the method does without, returned in the model's."""
        method, p, base = self.methods[adapter], self.tensors(adapter), self.get_base_layer()
        if isinstance(base, nn.Embedding):
            table = method.weight(oriented(base).float(), p).T
            return y + (table[x] - base.weight[x].float()).to(y.dtype) * (
                1 if self._get_embed_scale() is None else self._get_embed_scale()
            )
        if not method.precise:
            return method.forward(x, y, p, base)
        own = next(iter(self.adapter_params[adapter].parameters())).dtype
        forward = method.forward
        # W' is made again in backward, not kept
        if isinstance(base, Quantized) and type(method).forward is Delta.forward:
            forward = partial(checkpoint, forward, use_reentrant=False)
        return forward(x.to(own), y.to(own), p, base).to(y.dtype)


class DeltaModel(BaseTuner):
    """Inserts DeltaLayers."""

    target_module_mapping = TARGETS
    tuner_layer_cls: type[DeltaLayer]

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        cast(Any, self.peft_config[adapter_name]).settings().enter(model)
        return super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(self, config, adapter, target, target_name, parent, current_key=None, **_):
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter, config, current_key or "")
            return
        layer = self.tuner_layer_cls(target, adapter, config, current_key or "")
        if adapter not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def sideways(model: Network) -> bool:
    """Does a network keep its weights as [in, out] (GPT-2)?"""
    return any(isinstance(m, Conv1D) for m in model.modules())
