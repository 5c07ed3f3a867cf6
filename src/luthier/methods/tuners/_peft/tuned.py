"""A model with a PEFT type, luthier's or PEFT's own: the interface to a run, and its export."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.errors import RecipeError, out_of_memory
from luthier.methods.tuners._base import ParamGroup, TunedModel
from luthier.methods.tuners._delta import Delta, oriented
from luthier.methods.tuners._peft.io import low_rank_factors, plain_state, write_adapter
from luthier.methods.tuners._peft.layer import ADAPTER, INITIAL, SIDEWAYS, DeltaLayer, sideways
from luthier.methods.tuners._peft.module import hand_over
from luthier.methods.tuners._peft.targets import (
    ModuleNames,
    as_list,
    bypassed_modules,
    ends_one,
    first_line,
    tied_modules,
)
from luthier.model.experts import joined_weights, stacked
from luthier.model.quantized_linear import Quantized, QuantizedMatrix, modules, numbers, opened
from luthier.model.statistics import statistics
from luthier.registry import did_you_mean
from luthier.storage import checkpoints, files

if TYPE_CHECKING:
    from luthier.model.network import Network


class PeftTunedModel(TunedModel):
    """A PEFT type on a model. The model stays a transformers model, with layers inserted."""

    def __init__(self, settings: Any, model: Network, config: PeftConfig):
        super().__init__(settings, model)
        tied, present = tied_modules(model), ModuleNames(model)
        for name in as_list(getattr(config, "modules_to_save", None)):
            if not ends_one(name, present.names):
                leaves = {n.rpartition(".")[2] for n in present.names}
                raise RecipeError(
                    f"tuner '{settings.name}': modules_to_save '{name}' matches"
                    f" nothing{did_you_mean(name, leaves)}"
                )
        start = list(model.parameters()) if getattr(config, "bias", "none") != "none" else []
        target_parameters = set(as_list(getattr(config, "target_parameters", None)))
        coded = [n for n, m in modules(model).items() if isinstance(m, QuantizedMatrix)]
        for name in target_parameters:
            if any(n.endswith("." + name.rpartition(".")[2]) for n in coded):
                raise RecipeError(
                    f"tuner '{settings.name}': target_parameters '{name}' is quantized; keep"
                    " the experts unquantized with quantization.skip_modules: [experts]"
                )
        unmatched = present.unmatched(config)
        bypassed = bypassed_modules(model, config, settings)
        if bypassed is not None:
            cast(Any, config).exclude_modules = bypassed
        named = getattr(config, "target_modules", None) is not None  # else the modules are PEFT's usual ones
        wholes = (config, settings)
        all_linear = any(getattr(where, "target_modules", None) == "all-linear" for where in wholes)
        mode = model.training
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                self.peft = get_peft_model(model, config)
            except (ValueError, TypeError, NotImplementedError, IndexError) as error:
                reason = present.none_chosen(settings.name, config)
                if reason is None:
                    hint = present.hint(present.missing(config))
                    reason = f"tuner '{settings.name}' on {type(model).__name__}: {first_line(error)}{hint}"
                raise RecipeError(reason) from None
        # PEFT adds those of fused experts, and there are none here
        if coded and getattr(config, "target_parameters", None):
            config.target_parameters = sorted(target_parameters)
        model.train(mode)  # new dropouts come awake
        messages = [str(w.message) for w in caught if issubclass(w.category, (UserWarning, RuntimeWarning))]
        # else they are PEFT's, for fused experts
        own = any(k.endswith("_pattern") for k in getattr(settings, "config", None) or {})
        self.warnings = tuple(s for s in messages if own or "_pattern keys did not match" not in s)
        for name in unmatched:
            hint = present.hint(name)
            self.warnings += (f"tuner '{settings.name}': exclude_modules '{name}' matches nothing{hint}",)
        self.layers: dict[str, BaseTunerLayer] = {}
        self.token_rows: dict[str, BaseTunerLayer] = {}  # of tokens that train beside the layers
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                beside = name.endswith(".token_adapter")
                (self.token_rows if beside else self.layers)[name] = module
        # biases that train: off() puts them back
        self.start = [(p, p.detach().clone()) for p in start if p.requires_grad]
        self.biases = {id(p) for p, _ in self.start}
        self._check(config, tied, present, named)
        if all_linear:
            self.warnings += self.experts_left_out("all-linear")

    def _check(self, config: PeftConfig, tied: list[list[str]], present: ModuleNames, named: bool) -> None:
        """What was asked for is there, and touches nothing else. named: the settings name the modules."""
        tuner = self.placer
        hit = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
        missing = present.missing(config) if named else None
        if missing:
            raise RecipeError(
                f"tuner '{self.settings.name}': target_modules '{missing}' matches"
                f" nothing{present.hint(missing)}"
            )
        for name in as_list(getattr(config, "target_parameters", None)):
            if not ends_one(name, hit):
                raise RecipeError(
                    f"tuner '{self.settings.name}': target_parameters '{name}' matches"
                    f" nothing{did_you_mean(name, present.bare)}"
                )
        if silent := sorted(present.uncalled & set(hit)):
            raise RecipeError(
                f"tuner '{self.settings.name}': {type(self.model).__name__} reads the weight of {silent[0]}"
                " without calling the module, so nothing can be learned beside it; leave it out of"
                " target_modules"
            )
        whole = []
        for name, module in self.model.named_modules():
            rows = isinstance(module, TrainableTokensWrapper)  # PEFT ties rows of tokens by itself
            if isinstance(module, AuxiliaryTrainingWrapper) and not rows:
                whole.append(name)
        for group in tied:
            touched = [n for n in group if n in {*hit, *whole}]
            if touched:
                other = next((n for n in group if n not in touched), group[-1])
                raise RecipeError(
                    f"tuner '{self.settings.name}': {touched[0]} shares its weight with {other}"
                    " (tie_word_embeddings), and training would separate them; leave it out of"
                    " target_modules and modules_to_save, or use full or lisa"
                )

    @property
    def placer(self) -> BaseTuner:
        """What of PEFT put the layers in place."""
        return cast(BaseTuner, self.peft.base_model)

    # --- what moves

    def all_param_groups(self):
        return self.own_param_groups

    @cached_property
    def own_param_groups(self) -> list[ParamGroup]:
        """A and B of a layer together; then whole modules and biases."""
        param_groups, assigned = [], set()
        for name, layer in {**self.layers, **self.token_rows}.items():
            slots = {}
            for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
                adapters = getattr(layer, attribute, None)
                entry = (
                    adapters[ADAPTER]
                    if isinstance(adapters, (nn.ModuleDict, nn.ParameterDict)) and ADAPTER in adapters
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
            slots = {k: p for k, p in slots.items() if id(p) not in assigned}
            if slots:
                param_groups.append(ParamGroup(name, slots, self.settings))
                assigned |= {id(p) for p in slots.values()}
        whole = [f"{n}." for n, m in self.model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        for name, module in self.model.named_modules():  # modules_to_save, biases
            further = f".{ADAPTER}" in name and name.startswith(tuple(whole))
            slots = {
                k: p
                for k, p in module.named_parameters(recurse=False)
                if id(p) not in assigned and (further or id(p) in self.biases)
            }
            if slots:
                param_groups.append(ParamGroup(name, slots, None))
                assigned |= {id(p) for p in slots.values()}
        return param_groups

    def frozen_tensors(self):
        """Frozen tensors that the adapter file holds, too."""
        real = {id(b) for b in self.peft.buffers()}
        saved = get_peft_model_state_dict(
            self.peft, state_dict=self.peft.state_dict(keep_vars=True), save_embedding_layers=False
        )
        return {k: v for k, v in saved.items() if id(v) in real}

    def experts_left_out(self, reason: str) -> tuple[str, ...]:
        """A warning where nothing sits on experts that are one tensor. reason: what leaves them out."""
        reached = {
            id(getattr(m.get_base_layer(), m.parameter_name))
            for m in self.layers.values()
            if isinstance(m, ParamWrapper)
        }
        fused = [
            (f"{n}.{k}", p.numel())
            for n, k, p in joined_weights(self.model)
            if id(p) not in reached and not n.startswith(tuple(self.layers))
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
        reach = "tuner 'lora' trains them with target_parameters"
        reach += " if quantization.skip_modules: [experts] keeps them unquantized" if coded else ""
        return (
            (
                f"{reason} leaves out {len(fused + coded)} fused expert weights ({(fused + coded)[0][0]},"
                f" ...; {share:.0%} of all parameters), which are not linear modules; {reach}"
            ),
        )

    # --- starting from data

    def initialize(self, rows, roles):
        if not isinstance(self.settings, Delta) or not self.settings.reads:
            return
        layers = {n: m for n, m in self.layers.items() if isinstance(m, DeltaLayer)}
        with self.off():
            for name, stats in statistics(
                self.settings.reads, layers, rows[: self.settings.init_rows], roles
            ):
                with torch.no_grad():
                    own = layers[name].adapter_params[ADAPTER].state_dict(keep_vars=True)
                    for slot, value in self.settings.start(
                        oriented(layers[name].get_base_layer()).detach(), stats
                    ).items():
                        own[slot].copy_(value)

    def entry_places(self, group, slot):
        layer = self.layers.get(group)
        if not isinstance(layer, DeltaLayer):
            return None
        places = layer.methods[ADAPTER].entry_places(slot, layer.tensors(ADAPTER))
        if places is None:
            return None
        base = layer.get_base_layer()
        out, width = base.size if isinstance(base, Quantized) else oriented(base).shape
        return places, (out, width)

    # --- other readings

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base model, exactly. Flags only: what requires a gradient stays as it is."""
        parts = [m for m in self.model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        was = [m._disable_adapters for m in parts]
        originals = [(p, p.data) for p, _ in self.start]
        try:
            for m in parts:
                m._disable_adapters = True
            for p, start in self.start:
                p.data = start
            yield
        finally:
            for m, before in zip(parts, was, strict=True):
                m._disable_adapters = before
            for p, data in originals:
                p.data = data

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """The layers step aside and the weights carry the change. Afterwards the weights are what they were,
        bit for bit.
        """
        layers = (*self.layers.values(), *self.token_rows.values())
        bases = {id(b): b for b in (layer.get_base_layer() for layer in layers)}
        with opened(bases.values()):
            yield from self._merged(bases)

    def _merged(self, bases: dict[int, nn.Module]) -> Iterator[nn.Module]:
        originals = [(t, t.data) for b in bases.values() for t in (*b.parameters(), *b.buffers())]
        for tensor, data in originals:
            tensor.data = data.clone()
        try:
            try:
                self.peft.merge_adapter()
            except (NotImplementedError, ValueError, RuntimeError) as error:
                if out_of_memory(error):
                    raise
                reason = f": {first_line(error)}" if str(error) else ""
                raise RecipeError(
                    f"tuner '{self.settings.name}' cannot be merged into the weights{reason}"
                ) from None
            yield self.model
        finally:
            self._unmerge()
            for tensor, data in originals:
                tensor.data = data

    def _unmerge(self) -> None:
        """Every layer stands beside its base again; the weights are put back by whoever kept them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for module in self.model.modules():
                layer: Any = module
                if isinstance(module, BaseTunerLayer) and layer.merged:
                    layer.unmerge()
                    layer.merged_adapters.clear()  # OSF leaves it to others to restore weights

    # --- loops that are not luthier's

    def module(self) -> nn.Module:
        return hand_over(self, self.peft)

    # --- files

    def adapter_state(self) -> dict[str, Tensor]:
        """The tensors of adapter_model.safetensors."""
        return get_peft_model_state_dict(self.peft, save_embedding_layers=False)

    def config(self) -> PeftConfig:
        """What adapter_config.json says."""
        config = copy.deepcopy(self.peft.peft_config[ADAPTER])
        config.inference_mode = True
        return config

    def save(self, folder):
        write_adapter(Path(folder), self.adapter_state(), self.config(), self.model)

    def read(self, folder):
        path = Path(folder) / "adapter_model.safetensors"
        if checkpoints.paths(Path(folder)) or not path.is_file():
            return super().read(folder)
        self._same_settings(files.read_object(Path(folder) / "adapter_config.json"), folder)
        before = self.tensors()
        # PEFT adds the base's embeddings
        file = {k: v for k, v in load_file(str(path)).items() if not k.endswith(".base_layer.weight")}
        own = {id(t) for t in self.state().values()}
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
            if out_of_memory(error):
                raise
            raise RecipeError(
                f"the adapter in {folder} does not fit tuner '{self.settings.name}': {first_line(error)}"
            ) from None
        finally:
            self.load(before)

    def unpack(self, file: dict[str, Tensor]) -> dict[str, Tensor]:
        """The way back from `state` where it is more than PEFT's."""
        return file

    def _same_settings(self, saved: dict, folder: Any) -> None:
        """An adapter read under another scale or rank would be another function."""
        mine = json.loads(
            json.dumps(self.config().to_dict(), default=lambda x: sorted(x) if isinstance(x, set) else str(x))
        )
        for key, value in mine.items():
            if key in saved and key not in COMPATIBLE and saved[key] != value:
                raise RecipeError(
                    f"the adapter in {folder} was trained with {key}={saved[key]}, but this"
                    f" recipe has {key}={value}"
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
                layer.methods[ADAPTER].factors(layer.tensors(ADAPTER))
                if isinstance(layer, DeltaLayer)
                else None
            )
            if both is None or (rank is not None and rank < len(both[0])):
                delta = layer.get_delta_weight(ADAPTER).detach().float()
                delta = delta.T if isinstance(base, SIDEWAYS) else delta
                both, error = low_rank_factors(delta, rank)
                worst = max(worst, error)
            A, B = (t.detach().float().cpu().contiguous() for t in both)
            kind, end = ("lora_embedding_", "") if isinstance(base, nn.Embedding) else ("lora_", ".weight")
            state |= {f"base_model.model.{name}.{kind}A{end}": A, f"base_model.model.{name}.{kind}B{end}": B}
            ranks[name] = len(A)
        state |= {
            k: v
            for k, v in self.adapter_state().items()
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
            trainable_token_indices=getattr(self.config(), "trainable_token_indices", None),
            fan_in_fan_out=sideways(self.model),
        )
        config.base_model_name_or_path, config.inference_mode = self.config().base_model_name_or_path, True
        write_adapter(Path(folder), state, config, self.model)
        return worst

    def export_merged(self, folder: Path | str) -> None:
        """Write the tuned model as plain weights. Raises RecipeError where the architecture has no place for
        what tuning made.
        """
        with self.merged(), opened(modules(self.model).values()):
            state = stacked(self.model, plain_state(self.model))
            shapes = _empty_state(self.model, {})
            flags: dict[str, Any] = {}
            odd = sorted(state.keys() ^ shapes.keys())
            if odd and all(name.endswith(".bias") for name in odd):
                flags, shapes = _bias_flags(self.model, odd) or (flags, shapes)
                for name in shapes.keys() - state.keys():
                    state[name] = torch.zeros(shapes[name].shape, dtype=self.model.dtype)
                odd = sorted(state.keys() ^ shapes.keys())
            if odd:
                kind = type(self.model).__name__
                raise RecipeError(
                    f"merging tuner '{self.settings.name}' adds {odd[0]}, which {kind} has no"
                    " parameter for; keep the adapter unmerged"
                )
            config, own = self.model.config, {name: getattr(self.model.config, name) for name in flags}
            try:
                config.update(flags)
                self.model.save_pretrained(folder, state_dict=state)
            finally:
                config.update(own)


def _empty_state(model: Network, flags: dict[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of the weights of a network of this kind, with these settings in its config."""
    config = copy.deepcopy(model.config)
    config.update(flags)
    with torch.device("meta"):
        return type(model)(config).state_dict()


def _bias_flags(model: Network, biases: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Settings of a network's config that give its linear modules biases where tuning made them, and the
    weights that it has then; None where it has no such settings.
    """
    flags = {}
    for name in BIAS_SETTINGS:
        if getattr(model.config, name, None) is False:
            flags[name] = True
    if not flags:
        return None
    shapes = _empty_state(model, flags)
    return (flags, shapes) if shapes.keys() >= set(biases) else None


# how configs of transformers say that linear modules have biases
BIAS_SETTINGS = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "add_bias_linear")

# settings of an adapter that do not change what its tensors mean, or that the tensors' names tell
COMPATIBLE = {
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
