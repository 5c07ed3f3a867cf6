"""PEFT's own LoRA on a model: what the method file `lora.py` says, done. Beside _peft.py, for those who know PEFT."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.kernels.lora import linear, update
from luthier.method import RecipeError
from luthier.quantizers._quantizer import Quantized, opened
from luthier.tuners._delta import oriented
from luthier.tuners._peft import ADAPTER, INITIAL, OnPeft, plain_settings, sideways

if TYPE_CHECKING:
    from luthier.architectures._network import Matrix, Network


def attach(settings: Any, model: Network) -> OnPeft:
    said = plain_settings(settings)
    start = said["init_lora_weights"]
    own = isinstance(start, str) and start != "gaussian"  # made below, in fp32, and without touching the base
    if said["lora_alpha"] == int(said["lora_alpha"]):
        said["lora_alpha"] = int(said["lora_alpha"])  # other readers of adapter_config.json expect an integer
    about = {"task_type": _task(model), "fan_in_fan_out": sideways(model)}
    config = LoraConfig(**{**said, "init_lora_weights": True if own else start, **about})
    attached = OnLora(settings, model, config)
    for layer in attached.layers.values():
        if type(layer) is Linear:
            layer.__class__ = QuickLinear  # the same tensors and settings, another forward
    if own:
        attached.begin(start)
    return attached


def _task(model: Network) -> str | None:
    return "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None


class OnLora(OnPeft):
    """LoRA, with a start of its own."""

    @torch.no_grad()
    def begin(self, start: str) -> None:
        """PiSSA, OLoRA or orthogonal factors in every linear layer."""
        if start == "lq":
            return self._begin_low()
        make = {"pissa": "pissa_init", "olora": "olora_init", "orthogonal": "orthogonal_init"}[start.split("_")[0]]
        linear = {n: m for n, m in self.layers.items() if isinstance(m, Linear)}
        if len(linear) < len(self.layers):
            other = next(n for n in self.layers if n not in linear)
            raise RecipeError(f"init_lora_weights: {start} is for linear modules only, and {other} is none")
        for name, layer in linear.items():
            base = cast("Matrix", layer.get_base_layer())
            if min(base.weight.shape) < layer.r[ADAPTER]:
                raise RecipeError(f"init_lora_weights: {start} wants r at most {min(base.weight.shape)} for {name}")
            with opened([base]):
                kept = base.weight.data
                turn = make == "olora_init" and isinstance(base, Conv1D)  # PEFT factors the weight as it lies
                base.weight.data = (oriented(base) if turn else kept).detach().float().clone()
                try:
                    getattr(layer, make)(*((ADAPTER, start) if make == "pissa_init" else (ADAPTER,)))
                except ValueError as error:
                    raise RecipeError(f"init_lora_weights: {error}") from None
                finally:
                    base.weight.data = kept
        if self.settings.subtracts:
            self._subtract(linear)

    def _begin_low(self) -> None:
        """The low-rank part of a base that quantizer lq_lora has split."""
        linear: dict[str, Any] = {}
        for name, layer in self.layers.items():
            base = layer.get_base_layer()
            codes = base.codes if isinstance(base, Quantized) else {}
            if "L1" not in codes:
                raise RecipeError(f"init_lora_weights: lq wants a base split by `quantization: lq_lora`, and {name} has no low-rank part")
            if codes["L1"].shape[1] != layer.r[ADAPTER]:
                raise RecipeError(f"init_lora_weights: lq wants the rank of the base's low-rank part: r: {codes['L1'].shape[1]}")
            layer.lora_A[ADAPTER].weight.data.copy_(codes["L2"])
            layer.lora_B[ADAPTER].weight.data.copy_(codes["L1"] / layer.scaling[ADAPTER])
            linear[name] = layer
        self._subtract(linear)

    def _subtract(self, linear: Mapping[str, LoraLayer]) -> None:
        config = copy.deepcopy(self.peft.peft_config[ADAPTER])
        config.lora_dropout, config.modules_to_save, config.bias = 0.0, None, "none"
        mode = self.model.training
        self.peft.add_adapter(INITIAL, config)
        self.model.train(mode)
        for layer in linear.values():
            layer.set_adapter([ADAPTER, INITIAL])
            parts: list[tuple[Any, int]] = [(layer.lora_A, 1), (layer.lora_B, -1)]
            for part, sign in parts:
                part[INITIAL].weight.data = sign * part[ADAPTER].weight.data.clone()
                part[INITIAL].requires_grad_(False)

    def buffers(self):
        if not self.settings.subtracts:
            return {}
        return {f"{n}.{k}{INITIAL}": getattr(m, f"lora_{k}")[INITIAL].weight for n, m in self.layers.items() for k in "AB"}

    def state(self):
        state = super().state()
        if not self.settings.subtracts:
            return state
        for name, layer in self.layers.items():
            for part, dim in (("lora_A", 0), ("lora_B", 1)):
                key = f"base_model.model.{name}.{part}.weight"
                state[key] = torch.cat([state[key], getattr(layer, part)[INITIAL].weight], dim)
        return state

    def unpack(self, file):
        if not self.settings.subtracts:
            return file
        file = dict(file)
        for name, layer in self.layers.items():
            for part, dim in (("lora_A", 0), ("lora_B", 1)):
                key = f"base_model.model.{name}.{part}.weight"
                file[key], initial = file[key].split(self.settings.r, dim)
                getattr(layer, part)[INITIAL].weight.data.copy_(initial)
        return file

    def config(self):
        config = super().config()
        if self.settings.subtracts:  # twice the rank, the same scale
            config.r *= 2
            config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
            config.init_lora_weights = True
        return config

    def export_lora(self, folder, rank=None):
        if rank is not None:
            return super().export_lora(folder, rank)
        if self.settings.use_dora or self.settings.bias != "none":
            raise RecipeError("LoRA with DoRA or with trained biases has no plain LoRA form; its own adapter is what `save` writes")
        self.save(Path(folder))
        return 0.0


class QuickLinear(Linear):
    """PEFT's LoRA layer, read through kernels/lora.py wherever nothing but x A' B' is asked of it."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        live = [a for a in self.active_adapters if a in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or not all(map(self._is_plain, live)):
            return super().forward(x, *args, **kwargs)
        base = cast("Matrix", self.get_base_layer())
        if live and _is_matrix(base) and x.dtype == base.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            first, *live = live
            y = linear(x, oriented(base), base.bias, *self._factors(first), self.scaling[first])
        else:
            y = self.base_layer(x)
            if y.dtype != x.dtype:  # autocast
                return super().forward(x)
        for a in live:
            y = update(x, y, *self._factors(a), self.scaling[a])
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if isinstance(base, Quantized) and "weight" not in base._parameters:
            raise ValueError("a weight that is kept as codes takes no change: open the module first (luthier.quantizers)")
        super().merge(safe_merge, adapter_names)

    def _factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = (cast("Matrix", part[adapter]).weight for part in (self.lora_A, self.lora_B))
        return A, B

    def _is_plain(self, adapter: str) -> bool:
        drops = self.training and not isinstance(self.lora_dropout[adapter], nn.Identity)
        return not drops and adapter not in self.lora_variant and self.lora_B[adapter].bias is None


def _is_matrix(base: nn.Module) -> bool:
    """A frozen weight, and nothing around it."""
    plain = type(base) in (nn.Linear, Conv1D) and not (base._forward_hooks or base._forward_pre_hooks)
    return plain and not any(p.requires_grad for p in base.parameters())
