"""Which modules a network has, and whether the modules named in settings are among them."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists as exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import RecipeError
from luthier.model.anatomy import layer_of
from luthier.model.linear import linear_modules, uncalled_modules
from luthier.registry import did_you_mean

if TYPE_CHECKING:
    from luthier.model.network import Network


def as_list(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple, set)) else [value]


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def ends_one(name: str, every: Any) -> bool:
    return any(n == name or n.endswith(f".{name}") for n in every)


class ModuleNames:
    """The modules of a model before anything is inserted."""

    def __init__(self, model: Network):
        self.names = [n for n, _ in model.named_modules() if n]
        self.uncalled = set(uncalled_modules(model))
        self.linear = list(all_linear(model))
        # last names of the modules that hold a matrix, and how many there are of each
        self.leaves: dict[str, int] = {}
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
                leaf = name.rpartition(".")[2]
                self.leaves[leaf] = self.leaves.get(leaf, 0) + 1
        self.bare = sorted({re.sub(r"^.*\.\d+\.", "", n) for n, p in model.named_parameters() if p.ndim > 1})

    def missing(self, config: PeftConfig) -> str | None:
        """The first of the listed targets that is the end of no module's name."""
        targets = getattr(config, "target_modules", None)
        return (
            next((a for a in sorted(targets) if not ends_one(a, self.names)), None)
            if isinstance(targets, (list, set, tuple))
            else None
        )

    def none_chosen(self, tuner: str, config: PeftConfig) -> str | None:
        """Why a config chooses no module of the model, as a sentence; None where it chooses some, or leaves
        the choice to PEFT.
        """
        target: Any = getattr(config, "target_modules", None)
        if target is None or getattr(config, "target_parameters", None):
            return None
        everywhere: Any = copy.copy(config)
        everywhere.exclude_modules = None
        chosen = self.linear
        if target != "all-linear":
            chosen = [name for name in self.names if exists(everywhere, name)]
        if not chosen:
            return nothing_matches(tuner, target, self)
        excluded = getattr(config, "exclude_modules", None)
        if excluded and all(is_excluded(name, excluded) for name in chosen):
            return (
                f"tuner '{tuner}': exclude_modules {in_words(excluded)} leaves none of the {len(chosen)}"
                " modules that target_modules chooses"
            )
        return None

    def unmatched(self, config: PeftConfig) -> list[str]:
        """What `exclude_modules` names, or its regular expression, and no module has."""
        excluded = getattr(config, "exclude_modules", None)
        if isinstance(excluded, str):
            return [] if any(re.fullmatch(excluded, name) for name in self.names) else [excluded]
        return sorted(name for name in as_list(excluded) if not ends_one(name, self.names))

    def hint(self, name: str | None) -> str:
        """What was probably meant, and what there is."""
        near = did_you_mean(name.rpartition(".")[2], self.leaves) if name else ""
        near = near if near.startswith(";") else ""
        return f"{near} (the model has: {', '.join(f'{k} {n}x' for k, n in self.leaves.items())})"


def all_linear(model: Network) -> dict[str, Any]:
    """The modules that all-linear means: those that a network calls, but for its head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    left_out = uncalled_modules(model)
    modules = {}
    for name, module in linear_modules(model).items():
        if module is not head and name not in left_out:
            modules[name] = module
    return modules


def nothing_matches(tuner: str, target: Any, present: ModuleNames) -> str:
    """A sentence for a `target_modules` that is the name of no module."""
    names = as_list(target)
    if not names:
        return f"tuner '{tuner}': target_modules [] names no module{present.hint(None)}"
    return f"tuner '{tuner}': target_modules {in_words(target)} matches nothing{present.hint(min(names))}"


def in_words(names: Any) -> str:
    """'a', 'b': a regular expression, or names."""
    return ", ".join(f"'{name}'" for name in sorted(as_list(names)))


def is_excluded(name: str, exclude: Any) -> bool:
    """By a regular expression of whole names, or a list of their ends."""
    if isinstance(exclude, str):
        return re.fullmatch(exclude, name) is not None
    return any(ends_one(end, [name]) for end in exclude or ())


# networks whose kernels read the weight of these modules without calling the module
FUSED_STATE_SPACE = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
LORA_LIKE = {"ADALORA", "LORA", "RANDLORA", "XLORA"}


def bypassed_modules(model: Network, config: PeftConfig, settings: Any) -> Any:
    """`exclude_modules` of all-linear settings with what a state-space network does not call, and what PEFT
    refuses LoRA on there; None: as they are.
    """
    targets = [getattr(where, "target_modules", None) for where in (config, settings)]
    targets.append((getattr(settings, "config", None) or {}).get("target_modules"))
    if "all-linear" not in targets or not hasattr(config, "exclude_modules"):
        return None
    out = {name.rpartition(".")[2] for name in uncalled_modules(model)}
    lora_like = str(getattr(config.peft_type, "value", config.peft_type)) in LORA_LIKE
    if lora_like and getattr(model.config, "model_type", None) in FUSED_STATE_SPACE:
        linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        out |= linear & {"conv1d", "out_proj"}
    if not out:
        return None
    if isinstance(config.exclude_modules, str):
        return rf"{config.exclude_modules}|.*\.({'|'.join(sorted(out))})"
    return sorted(out | set(as_list(config.exclude_modules)))


def tied_modules(model: Network) -> list[list[str]]:
    """Groups of modules that hold the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                groups.setdefault(id(p), []).append(name)
    return [g for g in groups.values() if len(g) > 1]


def check_where(tuner: str, where: Any) -> None:
    """Raises RecipeError for a regular expression that is none, and for `layers_pattern` without layers."""
    for key in ("target_modules", "exclude_modules"):
        pattern = getattr(where, key, None)
        if not isinstance(pattern, str):
            continue
        try:
            re.compile(pattern)
        except re.error as error:
            raise RecipeError(
                f"tuner '{tuner}': {key} '{pattern}' is no regular expression ({error}); write one name"
                " as a list"
            ) from None
    if getattr(where, "layers_pattern", None) and where.layers_to_transform is None:
        raise RecipeError(
            f"tuner '{tuner}': layers_pattern names the list in which layers_to_transform are counted; set"
            " layers_to_transform, too"
        )


def in_layers(settings: Any, model: Network) -> Any:
    """Settings in which `layers_to_transform` is carried out where PEFT itself cannot, beside all-linear, a
    regular expression or whole names: their modules in these layers, by their whole names. Raises RecipeError
    where a layer has none.
    """
    check_where(settings.name, settings)
    if settings.layers_to_transform is None:
        return settings
    layers, target = as_list(settings.layers_to_transform), settings.target_modules
    inside = modules_in_layers(settings.name, target, layers, settings, model)
    if only_ends(target, model):
        return settings
    return replace(settings, target_modules=inside, layers_to_transform=None, layers_pattern=None)


def only_ends(target: Any, model: Network) -> bool:
    """Whether these are ends of names: PEFT looks at the layer of a module for them alone."""
    if isinstance(target, str):
        return False
    names = {name for name, _ in model.named_modules()}
    return not any(name in names and _depth(name, None) is not None for name in target)


def modules_in_layers(tuner: str, target: Any, layers: list[int], where: Any, model: Network) -> list[str]:
    """The whole names of the modules in these layers that `target` chooses: all-linear, a regular expression,
    or a list of names and their ends, where what stands in no layer stays. where: settings with a
    `layers_pattern`. Raises RecipeError where a layer has none.
    """
    if not layers:
        raise RecipeError(f"tuner '{tuner}': layers_to_transform [] names no layer; leave it out for all")
    names: list[str] = []
    outside: list[str] = []
    if target == "all-linear":
        names = list(all_linear(model))
    elif isinstance(target, str):
        names = [name for name, _ in model.named_modules() if re.fullmatch(target, name)]
    else:
        names = [name for name, _ in model.named_modules() if any(ends_one(end, [name]) for end in target)]
        outside = [name for name in names if name in target and _depth(name, None) is None]
    if not names:
        raise RecipeError(nothing_matches(tuner, target, ModuleNames(model)))
    pattern = getattr(where, "layers_pattern", None)
    depths = {name: _depth(name, pattern) for name in names}
    for layer in layers:
        if layer not in depths.values():
            raise RecipeError(
                f"tuner '{tuner}': layers_to_transform {layer} matches none of the {len(names)}"
                " modules that target_modules chooses"
            )
    return [name for name in names if depths[name] in layers or name in outside]


def _depth(name: str, patterns: Any) -> int | None:
    """The number of the layer that a module stands in. patterns: names of the list of layers, or none."""
    if not patterns:
        place = layer_of(f"{name}.")
        return None if place is None else place[1]
    for pattern in as_list(patterns):
        if match := re.match(rf".*\.{pattern}\.(\d+)\.", f".{name}."):
            return int(match[1])
    return None
