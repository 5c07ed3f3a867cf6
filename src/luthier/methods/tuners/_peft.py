"""The only file that knows PEFT: makes every Delta a real PEFT type, and puts any PEFT type on a model.

Importing it registers all Deltas, so that `PeftModel.from_pretrained` and `transformers.load_adapter` know
them (tuners/_register.py sees to it that this happens). Method files import it only inside `attach`. Its
neighbour _peft_lora.py holds what is special about PEFT's own LoRA.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, fields, make_dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.peft_types import PeftType, register_peft_method
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from luthier.compat import peft as _register
from luthier.errors import RecipeError
from luthier.methods.quantizers._base import Quantized, QuantizedMatrix, modules, numbers, opened
from luthier.methods.tuners._base import ParamGroup, TunedModel
from luthier.methods.tuners._delta import Delta, oriented
from luthier.model.calibration import statistics
from luthier.model.experts import stacked
from luthier.registry import did_you_mean, find, names, provides_of
from luthier.storage import checkpoints

if TYPE_CHECKING:
    from luthier.model.network import Matrix, Network

ADAPTER = "default"
SAID = {  # settings that adapter_config.json always spells out: every reader has known them for years
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "auto_mapping",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "target_modules",
    "modules_to_save",
    "fan_in_fan_out",
    "init_lora_weights",
    "use_rslora",
    "use_dora",
    "num_virtual_tokens",
    "token_dim",
    "num_transformer_submodules",
    "num_attention_heads",
    "num_layers",
}
INITIAL = "luthier_initial"  # a frozen second adapter: minus what the first one starts with
SIDEWAYS = (Conv1D, nn.Embedding)  # modules that keep their weight as [in, out]
_made: dict[type, type] = {}


# ---------------------------------------------------------------------------------------------- a Delta as a PEFT type


class Tensors(nn.Module):
    """The tensors of one adapter on one layer, in fp32 whatever the base is; whole numbers and truth values
    as they are.
    """

    watch: Any = None  # called with the gradient of the tuned weight [out, in], by forwards that form it

    def __init__(self, made: Mapping[str, Any]):
        super().__init__()
        for name, value in made.items():
            if isinstance(value, tuple):
                kept = value[1].float() if value[1].is_floating_point() else value[1]
                self.register_buffer(name, kept.contiguous(), persistent=value[0] == "frozen")
            else:
                setattr(self, name, nn.Parameter(value.float().contiguous()))


class Layer(nn.Module, BaseTunerLayer):
    """A module under one or several Deltas."""

    slot: str  # "luthier_ssf_tensors": the attribute that holds adapter name -> Tensors

    def __init__(self, base: nn.Module, adapter: str, config: Any, name: str = ""):
        nn.Module.__init__(self)
        self.base_layer, self.methods, self._undo = base, {}, []
        self._disable_adapters, self.merged_adapters, self._active_adapter = False, [], adapter
        setattr(self, self.slot, nn.ModuleDict())
        self.update_layer(adapter, config, name)

    @property
    def held(self) -> nn.ModuleDict:
        return getattr(self, self.slot)

    def get_base_layer(self) -> Matrix:
        return cast("Matrix", super().get_base_layer())

    def update_layer(self, adapter: str, config: Any, name: str = "") -> None:
        """Add an adapter. name: of this module in the network."""
        method = config.settings().at(name)
        base = self.get_base_layer()
        known = isinstance(base, (*method.kinds, Conv1D)) and base.weight.is_floating_point()
        if not known or base.weight.ndim > 2:
            raise ValueError(f"tuner '{method.name}' cannot sit on a {type(base).__name__}")
        self.methods[adapter] = method
        self.held[adapter] = Tensors(method.init(oriented(base).detach()))
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        device = device or self.get_base_layer().weight.device
        if device.type != "meta" and not any(p.is_meta for p in self.held[adapter_name].parameters()):
            self.held[adapter_name].to(device)

    def tensors(self, adapter: str) -> SimpleNamespace:
        """What a Delta calls p."""
        held = self.held[adapter]
        return SimpleNamespace(**held._parameters, **held._buffers, watch=held.watch)

    def ahead(self) -> tuple[Tensor, Tensor] | None:
        """What kernels/attention.py puts before the keys and values of the attention that this module is a
        part of.
        """
        if self.disable_adapters or self.merged:
            return None
        said = [self.methods[a].ahead(self.tensors(a)) for a in self.active_adapters if a in self.held]
        there = [both for both in said if both is not None]
        return (torch.cat([k for k, _ in there]), torch.cat([v for _, v in there])) if there else None

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
                "a weight that is kept as codes takes no change: open the module first (luthier.quantizers)"
            )
        for adapter in check_adapters_to_merge(self, adapter_names) or []:
            if adapter not in self.held:
                continue
            weight, bias = self.tuned(adapter)
            if safe_merge and not weight.isfinite().all():
                raise ValueError(f"the merged weight of adapter {adapter} is not finite")
            old = getattr(base, "bias", None)
            self._undo.append((base.weight.data, old))
            weight = weight.T if isinstance(base, SIDEWAYS) else weight
            base.weight.data = weight.to(base.weight.dtype).contiguous()
            if bias is not None:
                base.bias = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)
            self.merged_adapters.append(adapter)

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
        live = [a for a in self.active_adapters if a in self.held]
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
        own = next(iter(self.held[adapter].parameters())).dtype
        forward = method.forward
        # W' is made again in backward, not kept
        if isinstance(base, Quantized) and type(method).forward is Delta.forward:
            forward = partial(checkpoint, forward, use_reentrant=False)
        return forward(x.to(own), y.to(own), p, base).to(y.dtype)


class Model(BaseTuner):
    """Puts Layers in place."""

    target_module_mapping = TARGETS
    tuner_layer_cls: type[Layer]

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


def plain_settings(settings: Any) -> dict[str, Any]:
    return {f.name: copy.copy(getattr(settings, f.name)) for f in fields(settings)}


def config_of(cls: type) -> type:
    """The PEFT config class of a Delta; made and registered with PEFT on first use."""
    if cls in _made:
        return _made[cls]
    name, own = f"luthier_{cls.name}", [f.name for f in fields(cls)]
    slot = f"{name}_tensors"

    def finish(self) -> None:
        PeftConfig.__post_init__(self)
        self.peft_type = PeftType(name.upper())
        for k in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, k), (list, tuple)):
                setattr(self, k, set(getattr(self, k)))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform wants target_modules as a list of names")

    def settings(self) -> Any:
        said = {k: getattr(self, k) for k in own}
        return cls(**{k: sorted(v) if isinstance(v, set) else v for k, v in said.items()})

    columns = [(f.name, object, field(default=f.default)) for f in fields(cls)]
    methods = {"__post_init__": finish, "settings": settings}
    config = make_dataclass(f"{cls.__name__}Config", columns, bases=(PeftConfig,), namespace=methods)
    layer = type(f"{cls.__name__}Layer", (Layer,), {"slot": slot, "adapter_layer_names": (slot,)})
    model = type(f"{cls.__name__}Model", (Model,), {"prefix": slot, "tuner_layer_cls": layer})
    _admit(name.upper())
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=slot)
    return _made.setdefault(cls, config)


def _admit(key: str) -> None:
    """PeftType is a closed enum, and register_peft_method insists on a member of it."""
    member = str.__new__(PeftType, key)
    member._name_ = member._value_ = key
    member.__objclass__, member._sort_order_ = PeftType, len(PeftType)
    type.__setattr__(PeftType, key, member)
    PeftType._member_names_.append(key)
    PeftType._member_map_[key] = PeftType._value2member_map_[key] = member


def register() -> None:
    """Make every Delta known to PEFT. A method that cannot be imported is told of and does not stop the
    others.
    """
    for name in names("tuner"):
        try:
            cls = find("tuner", name)
        except Exception as error:  # another package's tuner must not break `import peft`
            warnings.warn(f"luthier's tuner '{name}' is not known to PEFT: {error}", stacklevel=2)
            continue
        if issubclass(cls, Delta):
            config_of(cls)


# ---------------------------------------------------------------------------------------------- on a model


class OnPeft(TunedModel):
    """A PEFT type on a model. The model stays the transformers model, with layers put into it."""

    def __init__(self, settings: Any, model: Network, config: PeftConfig):
        super().__init__(settings, model)
        tied, there = _tied(model), _There(model)
        for name in _listed(getattr(config, "modules_to_save", None)):
            if not _ends(name, there.names):
                leaves = {n.rpartition(".")[2] for n in there.names}
                raise RecipeError(
                    f"tuner '{settings.name}': modules_to_save '{name}' matches nothing{did_you_mean(name, leaves)}"
                )
        start = list(model.parameters()) if getattr(config, "bias", "none") != "none" else []
        asked = set(_listed(getattr(config, "target_parameters", None)))
        coded = [n for n, m in modules(model).items() if isinstance(m, QuantizedMatrix)]
        for name in asked:
            if any(n.endswith("." + name.rpartition(".")[2]) for n in coded):
                raise RecipeError(
                    f"tuner '{settings.name}': target_parameters '{name}' is quantized, and is no parameter"
                    " any more: quantization.skip_modules: [experts] keeps the experts dense"
                )
        mode = model.training
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", UserWarning)
            try:
                self.peft = get_peft_model(model, config)
            except (ValueError, TypeError) as error:
                raise RecipeError(
                    f"tuner '{settings.name}': {_sentence(error)}{there.said(there.missed(config))}"
                ) from None
        # PEFT adds those of fused experts, and there are none here
        if coded and getattr(config, "target_parameters", None):
            config.target_parameters = sorted(asked)
        model.train(mode)  # new dropouts come awake
        said = [str(w.message) for w in heard if issubclass(w.category, (UserWarning, RuntimeWarning))]
        # else they are PEFT's, for fused experts
        own = any(k.endswith("_pattern") for k in getattr(settings, "config", None) or {})
        self.told = tuple(s for s in said if own or "_pattern keys did not match" not in s)
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        # biases that train: off() puts them back
        self.start = [(p, p.detach().clone()) for p in start if p.requires_grad]
        self.biases = {id(p) for p, _ in self.start}
        self._check(config, tied, there)
        self.told += self._left_out()

    def _check(self, config: PeftConfig, tied: list[list[str]], there: _There) -> None:
        """What was asked for is there, and touches nothing else."""
        tuner = self.placer
        hit = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
        missed = there.missed(config)
        if missed:
            raise RecipeError(
                f"tuner '{self.settings.name}': target_modules '{missed}' matches nothing{there.said(missed)}"
            )
        for name in _listed(getattr(config, "target_parameters", None)):
            if not _ends(name, hit):
                raise RecipeError(
                    f"tuner '{self.settings.name}': target_parameters '{name}' matches"
                    f" nothing{did_you_mean(name, there.bare)}"
                )
        for index in _listed(getattr(config, "layers_to_transform", None)):
            if not any(f".{index}." in h for h in hit):
                raise RecipeError(
                    f"tuner '{self.settings.name}': layers_to_transform {index} matches none of {len(hit)}"
                    " modules"
                )
        whole = [n for n, m in self.model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        for group in tied:
            touched = [n for n in group if n in {*hit, *whole}]
            if touched:
                other = next((n for n in group if n not in touched), group[-1])
                raise RecipeError(
                    f"tuner '{self.settings.name}': {touched[0]} shares its weight with {other}"
                    " (tie_word_embeddings), so the two would part in silence; leave it out of"
                    " target_modules and modules_to_save, or tune whole weights (full, lisa)"
                )

    @property
    def placer(self) -> BaseTuner:
        """What of PEFT put the layers in place."""
        return cast(BaseTuner, self.peft.base_model)

    # --- what moves

    def all_param_groups(self):
        return self.found

    @cached_property
    def found(self) -> list[ParamGroup]:
        """A and B of a layer together; then whole modules and biases."""
        param_groups, seen = [], set()
        for name, layer in self.layers.items():
            slots = {}
            for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
                held = getattr(layer, attribute, None)
                entry = (
                    held[ADAPTER]
                    if isinstance(held, (nn.ModuleDict, nn.ParameterDict)) and ADAPTER in held
                    else None
                )
                # lora_A -> A
                plain = attribute.removeprefix(self.placer.prefix).removeprefix("embedding_").lstrip("_")
                if isinstance(entry, nn.Parameter):
                    slots[plain] = entry
                elif isinstance(entry, nn.Module):
                    inner = entry.named_parameters()
                    slots |= {
                        plain if k == "weight" and plain else f"{plain}.{k}".lstrip("."): p for k, p in inner
                    }
            slots = {k: p for k, p in slots.items() if id(p) not in seen}
            if slots:
                param_groups.append(ParamGroup(name, slots, self.settings))
                seen |= {id(p) for p in slots.values()}
        whole = [f"{n}." for n, m in self.model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        for name, module in self.model.named_modules():  # modules_to_save, biases
            further = f".{ADAPTER}" in name and name.startswith(tuple(whole))
            slots = {
                k: p
                for k, p in module.named_parameters(recurse=False)
                if id(p) not in seen and (further or id(p) in self.biases)
            }
            if slots:
                param_groups.append(ParamGroup(name, slots, None))
                seen |= {id(p) for p in slots.values()}
        return param_groups

    def buffers(self):
        """Frozen tensors that the adapter file holds, too."""
        real = {id(b) for b in self.peft.buffers()}
        saved = get_peft_model_state_dict(
            self.peft, state_dict=self.peft.state_dict(keep_vars=True), save_embedding_layers=False
        )
        return {k: v for k, v in saved.items() if id(v) in real}

    def _left_out(self) -> tuple[str, ...]:
        """all-linear does not reach experts that are one tensor; say so."""
        if getattr(self.settings, "target_modules", "") != "all-linear":
            return ()
        reached = {
            id(getattr(m.get_base_layer(), m.parameter_name))
            for m in self.layers.values()
            if isinstance(m, ParamWrapper)
        }
        fused = [
            (f"{n}.{k}", p.numel())
            for n, m in self.model.named_modules()
            if not isinstance(m, nn.modules.conv._ConvNd)
            for k, p in m.named_parameters(recurse=False)
            if p.ndim == 3 and id(p) not in reached and not n.startswith(tuple(self.layers))
        ]
        coded = [
            (n, m.size[0] * m.size[1])
            for n, m in modules(self.model).items()
            if isinstance(m, QuantizedMatrix)
        ]
        if not fused and not coded:
            return ()
        share = sum(k for _, k in fused + coded) / (
            sum(p.numel() for p in self.model.parameters()) + numbers(self.model)
        )
        reach = "tuner 'lora' reaches them with target_parameters"
        reach += " where quantization.skip_modules: [experts] keeps them dense" if coded else ""
        return (
            (
                f"all-linear leaves out {len(fused + coded)} fused expert weights ({(fused + coded)[0][0]},"
                f" ...; {share:.0%} of all parameters), which are not linear modules; {reach}"
            ),
        )

    # --- starting from data

    def initialize(self, rows, roles):
        if not isinstance(self.settings, Delta) or not self.settings.reads:
            return
        layers = {n: m for n, m in self.layers.items() if isinstance(m, Layer)}
        with self.off():
            for name, seen in statistics(self.settings.reads, layers, rows[: self.settings.init_rows], roles):
                with torch.no_grad():
                    own = layers[name].held[ADAPTER].state_dict(keep_vars=True)
                    for slot, value in self.settings.start(
                        oriented(layers[name].get_base_layer()).detach(), seen
                    ).items():
                        own[slot].copy_(value)

    # --- other readings

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base model, exactly. Flags only: what requires a gradient stays as it is."""
        parts = [m for m in self.model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        was = [m._disable_adapters for m in parts]
        kept = [(p, p.data) for p, _ in self.start]
        try:
            for m in parts:
                m._disable_adapters = True
            for p, start in self.start:
                p.data = start
            yield
        finally:
            for m, before in zip(parts, was, strict=True):
                m._disable_adapters = before
            for p, data in kept:
                p.data = data

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """The layers step aside and the weights carry the change. Afterwards the weights are what they were,
        bit for bit.
        """
        bases = {id(b): b for b in (layer.get_base_layer() for layer in self.layers.values())}
        with opened(bases.values()):
            yield from self._merged(bases)

    def _merged(self, bases: dict[int, nn.Module]) -> Iterator[nn.Module]:
        kept = [(p, p.data) for b in bases.values() for p in b.parameters(recurse=False)]
        for p, data in kept:
            p.data = data.clone()
        try:
            try:
                self.peft.merge_adapter()
            except NotImplementedError:
                raise RecipeError(f"tuner '{self.settings.name}' cannot be merged into the weights") from None
            yield self.model
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                self.peft.unmerge_adapter()
            for p, data in kept:
                p.data = data

    # --- files

    def state(self) -> dict[str, Tensor]:
        """The tensors of adapter_model.safetensors."""
        return get_peft_model_state_dict(self.peft, save_embedding_layers=False)

    def config(self) -> PeftConfig:
        """What adapter_config.json says."""
        config = copy.deepcopy(self.peft.peft_config[ADAPTER])
        config.inference_mode = True
        return config

    def save(self, folder):
        _write(Path(folder), self.state(), self.config(), self.model)

    def read(self, folder):
        path = Path(folder) / "adapter_model.safetensors"
        if checkpoints.paths(Path(folder)) or not path.is_file():
            return super().read(folder)
        self._same_settings(
            json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8")), folder
        )
        kept = self.tensors()
        # PEFT adds the base's embeddings
        file = {k: v for k, v in load_file(str(path)).items() if not k.endswith(".base_layer.weight")}
        own = {id(t) for t in self._state().values()}
        keys: dict[int, set[str]] = {}  # some PEFT types hold one tensor under several names
        for k, v in self.peft.state_dict(keep_vars=True).items():
            if id(v) in own and f".{INITIAL}" not in k:
                keys.setdefault(id(v), set()).add(k)
        base = {k for k, p in self.peft.named_parameters() if id(p) not in own}
        try:
            odd = sorted(base & file.keys())
            file = self.unpack(file)
            result = set_peft_model_state_dict(self.peft, {k: v for k, v in file.items() if k not in base})
            odd += sorted(result.unexpected_keys) + sorted(
                min(k) for k in keys.values() if k <= set(result.missing_keys)
            )
            if odd:
                raise RuntimeError(", ".join(odd[:3]) + " ..." * (len(odd) > 3))
            return self.tensors()
        except (RuntimeError, KeyError) as error:
            raise RecipeError(
                f"the adapter in {folder} does not fit tuner '{self.settings.name}': {_sentence(error)}"
            ) from None
        finally:
            self.load(kept)

    def unpack(self, file: dict[str, Tensor]) -> dict[str, Tensor]:
        """The way back from `state` where it is more than PEFT's."""
        return file

    def _same_settings(self, said: dict, folder: Any) -> None:
        """An adapter read under another scale or rank would be another function."""
        mine = json.loads(
            json.dumps(self.config().to_dict(), default=lambda x: sorted(x) if isinstance(x, set) else str(x))
        )
        for key, value in mine.items():
            if key in said and key not in FREE and said[key] != value:
                raise RecipeError(
                    f"the adapter in {folder} was made with {key}={said[key]}, and this recipe says"
                    f" {key}={value}"
                )

    def export_lora(self, folder: Path | str, rank: int | None = None) -> float:
        """Write the adapter as LoRA that PEFT loads without luthier; the largest relative error of a layer is
        returned.

        Exact where the method has factors; else the best update of `rank` (None: as many directions as matter
        in fp32). Raises RecipeError where a method changes more than weights.
        """
        state: dict[str, Tensor] = {}
        ranks, worst = {}, 0.0
        for name, layer in self.layers.items():
            if not layer.supports_lora_conversion():
                raise RecipeError(
                    f"tuner '{self.settings.name}' changes more than the weight of {name}: it has no LoRA"
                    " form"
                )
            base = layer.get_base_layer()
            both = (
                layer.methods[ADAPTER].factors(layer.tensors(ADAPTER)) if isinstance(layer, Layer) else None
            )
            if both is None or (rank is not None and rank < len(both[0])):
                delta = layer.get_delta_weight(ADAPTER).detach().float()
                delta = delta.T if isinstance(base, SIDEWAYS) else delta
                both, error = _factor(delta, rank)
                worst = max(worst, error)
            A, B = (t.detach().float().cpu().contiguous() for t in both)
            kind, end = ("lora_embedding_", "") if isinstance(base, nn.Embedding) else ("lora_", ".weight")
            state |= {f"base_model.model.{name}.{kind}A{end}": A, f"base_model.model.{name}.{kind}B{end}": B}
            ranks[name] = len(A)
        state |= {
            k: v
            for k, v in self.state().items()
            if not any(k.startswith(f"base_model.model.{n}.") for n in self.layers)
        }
        top = max(ranks.values())
        other = {re.escape(n): r for n, r in ranks.items() if r != top}
        whole = getattr(self.config(), "modules_to_save", None)
        config = LoraConfig(
            r=top,
            lora_alpha=top,
            rank_pattern=other,
            alpha_pattern=dict(other),
            target_modules=sorted(ranks),
            modules_to_save=whole,
            fan_in_fan_out=sideways(self.model),
        )
        config.base_model_name_or_path, config.inference_mode = self.config().base_model_name_or_path, True
        _write(Path(folder), state, config, self.model)
        return worst

    def export_merged(self, folder: Path | str) -> None:
        """Write the tuned model as plain weights. Raises RecipeError where the architecture has no place for
        what tuning made.
        """
        with self.merged(), opened(modules(self.model).values()):
            state = stacked(self.model, _plain_state(self.model))
            with torch.device("meta"):
                place = set(type(self.model)(copy.deepcopy(self.model.config)).state_dict())
            odd = sorted(state.keys() ^ place)
            if odd:
                kind = type(self.model).__name__
                raise RecipeError(
                    f"merged, tuner '{self.settings.name}' makes {odd[0]}, for which {kind} has no place:"
                    " keep the adapter"
                )
            self.model.save_pretrained(folder, state_dict=state)


FREE = {  # settings of an adapter that do not change what its tensors mean, or that the tensors' names tell
    "base_model_name_or_path",
    "inference_mode",
    "revision",
    "task_type",
    "auto_mapping",
    "peft_version",
    "runtime_config",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "target_parameters",
    "init_lora_weights",
    "init_weights",
    "lora_dropout",
    "bias",
    "init_rows",
    "ensure_weight_tying",
    "plan",
}


# ---------------------------------------------------------------------------------------------- any PEFT type

ODD = {  # tuners of PEFT that need more of a run than layers in a model
    "ADALORA": (
        "its rank allocator must be stepped and its regulariser added to the loss; use tuner 'adalora'"
    ),
    "XLORA": "it mixes trained adapters through the forward of PeftModel",
    "POLY": "it needs a task id with every batch",
    "ADAPTION_PROMPT": "it replaces attention modules, which the packed layout relies on",
    "SHADOW": "it runs a second network inside the forward of PeftModel",
    "TRAINABLE_TOKENS": "it swaps the embedding module of the model",
}


def any_config(name: str, settings: Mapping[str, Any]) -> PeftConfig:
    """PEFT's own config of a type, checked. Raises RecipeError for an unknown type or setting, and for what
    cannot work here.
    """
    register()
    kinds = {k.value: k for k in PEFT_TYPE_TO_CONFIG_MAPPING}
    key = name.upper()
    if key not in kinds:
        raise RecipeError(f"type: PEFT has no '{name}'{did_you_mean(key, kinds).lower()}")
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kinds[key]]
    model = PEFT_TYPE_TO_TUNER_MAPPING[kinds[key]]
    if not (isinstance(model, type) and issubclass(model, BaseTuner)) and key not in ODD:
        raise RecipeError(
            f"type: {name} works inside PEFT's own forward, which packed batches do not go through; use tuner"
            " 'prompt'"
        )
    if key in ODD:
        raise RecipeError(f"type: {name} cannot be used here: {ODD[key]}")
    allowed = [f.name for f in fields(cls)]
    for k in settings:
        if k not in allowed:
            raise RecipeError(f"config: PEFT's {cls.__name__} has no setting '{k}'{did_you_mean(k, allowed)}")
    usual = {"target_modules": "all-linear"} if "target_modules" in allowed else {}
    start = settings.get("init_lora_weights", True)
    if key == "LORA" and start not in (True, "gaussian", "orthogonal"):
        raise RecipeError(
            f"config: init_lora_weights {start} changes the base or wants data; use tuner 'lora'"
        )
    if key.startswith("LUTHIER_"):
        raise RecipeError(
            f"type: {name} is luthier's own: write `tuner: {key.removeprefix('LUTHIER_').lower()}`"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(**{**usual, **settings})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"config: {_sentence(error)}") from None


def merges(config: PeftConfig) -> bool:
    """Do the layers of this type write themselves into the weights?"""
    layer = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)].tuner_layer_cls
    kinds = layer if isinstance(layer, tuple) else (layer,)
    return all(_merger(k) is not BaseTunerLayer.merge for k in kinds)


def _merger(kind: type) -> Any:
    """`merge` of a layer class; of its Linear where the class itself is only a base."""
    below = [c for c in kind.__subclasses__() if "merge" in vars(c)]
    return below[0].merge if below else kind.merge


# ---------------------------------------------------------------------------------------------- soft prompts


def write_prompt(folder: Path, vectors: Tensor, model: Network, seq2seq: bool = False) -> None:
    """[n, width] vectors as an adapter of PEFT's type PROMPT_TUNING."""
    text = model.config.get_text_config()
    config = PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        num_virtual_tokens=len(vectors),
        token_dim=vectors.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=text.num_attention_heads,
        num_layers=text.num_hidden_layers,
        inference_mode=True,
    )
    _write(folder, {"prompt_embeddings": vectors}, config, model)


# ---------------------------------------------------------------------------------------------- small things


def _listed(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple, set)) else [value]


def _sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _ends(name: str, every: Any) -> bool:
    return any(n == name or n.endswith(f".{name}") for n in every)


class _There:
    """What a model holds before anything is put into it."""

    def __init__(self, model: Network):
        self.names = [n for n, _ in model.named_modules() if n]
        # last names of the modules that hold a matrix, and how many there are of each
        self.leaves: dict[str, int] = {}
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
                leaf = name.rpartition(".")[2]
                self.leaves[leaf] = self.leaves.get(leaf, 0) + 1
        self.bare = sorted({re.sub(r"^.*\.\d+\.", "", n) for n, p in model.named_parameters() if p.ndim > 1})

    def missed(self, config: PeftConfig) -> str | None:
        """The first of the listed targets that is the end of no module's name."""
        asked = getattr(config, "target_modules", None)
        return (
            next((a for a in sorted(asked) if not _ends(a, self.names)), None)
            if isinstance(asked, (list, set, tuple))
            else None
        )

    def said(self, name: str | None) -> str:
        """What was probably meant, and what there is."""
        near = did_you_mean(name.rpartition(".")[2], self.leaves) if name else ""
        near = near if near.startswith(";") else ""
        return f"{near} (the model has: {', '.join(f'{k} {n}x' for k, n in self.leaves.items())})"


def _tied(model: Network) -> list[list[str]]:
    """Groups of modules that hold the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                groups.setdefault(id(p), []).append(name)
    return [g for g in groups.values() if len(g) > 1]


def _factor(delta: Tensor, rank: int | None) -> tuple[tuple[Tensor, Tensor], float]:
    """[out, in] -> A [r, in], B [out, r], and the relative error left."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    r = max(1, int((S > S[0] * 1e-6).sum())) if rank is None else min(rank, len(S))
    left = float(S[r:].norm() / S.norm().clamp(min=1e-30))
    return (Vh[:r], U[:, :r] * S[:r]), left


def sideways(model: Network) -> bool:
    """Does a network keep its weights as [in, out] (GPT-2)?"""
    return any(isinstance(m, Conv1D) for m in model.modules())


def _write(folder: Path, state: dict[str, Tensor], config: PeftConfig, model: Network) -> None:
    """adapter_model.safetensors, read back and compared, and adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    save_file(state, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    checkpoints.verify(state, folder / "adapter_model.safetensors")
    config.base_model_name_or_path = config.base_model_name_or_path or model.config._name_or_path or None
    made_for = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=made_for)
    _shorten(folder / "adapter_config.json", config)


def _shorten(path: Path, config: PeftConfig) -> None:
    """Leave out settings at their defaults that older readers (PEFT of last year, vLLM) may not know and
    would refuse.
    """
    usual = {f.name: f.default for f in fields(config)}
    said = json.loads(path.read_text(encoding="utf-8"))
    kept = {k: v for k, v in said.items() if k in SAID or k not in usual or v not in (usual[k], {}, [])}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plain_state(model: Network) -> dict[str, Tensor]:
    """The weights of a merged model under the names they have without PEFT."""
    out = {}
    wrapped = {
        n: m for n, m in model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    for name, value in model.state_dict().items():
        for n, m in reversed(wrapped.items()):  # the innermost first: wrappers of bare weights are nested
            if name.startswith(f"{n}."):
                keep = (
                    f"{n}.base_layer." if isinstance(m, BaseTunerLayer) else f"{n}.modules_to_save.{ADAPTER}."
                )
                name = f"{n}.{name.removeprefix(keep)}" if name.startswith(keep) else ""
        if name:
            out[name] = value
    return out


if _register.eager:
    register()
