"""Which modules a network has, and whether the modules named in settings are among them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import RecipeError
from luthier.model.anatomy import layer_of
from luthier.model.linear import linear_modules
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

    def hint(self, name: str | None) -> str:
        """What was probably meant, and what there is."""
        near = did_you_mean(name.rpartition(".")[2], self.leaves) if name else ""
        near = near if near.startswith(";") else ""
        return f"{near} (the model has: {', '.join(f'{k} {n}x' for k, n in self.leaves.items())})"


# networks whose kernels read the weight of these modules without calling the module
FUSED_STATE_SPACE = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
LORA_LIKE = {"ADALORA", "LORA", "RANDLORA", "XLORA"}


def bypassed_modules(model: Network, config: PeftConfig) -> list[str]:
    """What PEFT's all-linear is to leave out of a state-space network, where PEFT refuses LoRA on it."""
    if getattr(config, "target_modules", None) != "all-linear" or getattr(config, "exclude_modules", None):
        return []
    lora_like = str(getattr(config.peft_type, "value", config.peft_type)) in LORA_LIKE
    if not lora_like or getattr(model.config, "model_type", None) not in FUSED_STATE_SPACE:
        return []
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return sorted(linear & {"conv1d", "out_proj"})


def tied_modules(model: Network) -> list[list[str]]:
    """Groups of modules that hold the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                groups.setdefault(id(p), []).append(name)
    return [g for g in groups.values() if len(g) > 1]


def in_layers(settings: Any, model: Network) -> Any:
    """Settings in which `layers_to_transform` is carried out where PEFT itself cannot, beside all-linear or a
    regular expression: their modules in these layers, by their whole names. Raises RecipeError where there
    are none.
    """
    layers, target = as_list(settings.layers_to_transform), settings.target_modules
    if not layers or not isinstance(target, str):
        return settings
    inside = modules_in_layers(settings.name, target, layers, settings, model)
    return replace(settings, target_modules=inside, layers_to_transform=None, layers_pattern=None)


def modules_in_layers(tuner: str, target: str, layers: list[int], where: Any, model: Network) -> list[str]:
    """The whole names of the modules in these layers that `target`, all-linear or a regular expression,
    chooses. where: settings with a `layers_pattern`. Raises RecipeError where a layer has none.
    """
    if target == "all-linear":
        head = model.get_output_embeddings()
        names = [name for name, module in linear_modules(model).items() if module is not head]
    else:
        names = [name for name, _ in model.named_modules() if re.fullmatch(target, name)]
    depths = {name: _depth(name, where.layers_pattern) for name in names}
    for layer in layers:
        if layer not in depths.values():
            raise RecipeError(
                f"tuner '{tuner}': layers_to_transform {layer} matches none of the {len(names)}"
                " modules that target_modules chooses"
            )
    return [name for name in names if depths[name] in layers]


def _depth(name: str, patterns: Any) -> int | None:
    """The number of the layer that a module stands in. patterns: names of the list of layers, or none."""
    if not patterns:
        place = layer_of(f"{name}.")
        return None if place is None else place[1]
    for pattern in as_list(patterns):
        if match := re.match(rf".*\.{pattern}\.(\d+)\.", f".{name}."):
            return int(match[1])
    return None
