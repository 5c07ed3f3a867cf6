"""The modules that a tuner's settings choose, before anything is inserted into the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.tuners_utils import check_target_module_exists as exists

from luthier.errors import RecipeError
from luthier.methods.tuners._peft.registration import config_for
from luthier.methods.tuners._peft.targets import ModuleNames, all_linear, is_excluded

if TYPE_CHECKING:
    from luthier.model.network import Network


def chosen_modules(settings: Any, model: Network, required: bool = False) -> dict[str, Any]:
    """The modules that `target_modules` and the other settings of TargetModules choose. required: raises
    RecipeError where there are none.
    """
    config = config_for(settings, model)
    chosen = {}
    if config.target_modules == "all-linear":
        for name, module in all_linear(model).items():
            if not is_excluded(name, config.exclude_modules):
                chosen[name] = module
    else:
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer) or not exists(config, name):
                continue
            if isinstance(getattr(module, "weight", None), torch.Tensor):
                chosen[name] = module
    if required and not chosen:
        reason = ModuleNames(model).none_chosen(settings.name, config)
        raise RecipeError(reason or f"tuner '{settings.name}' finds no weights in the chosen modules")
    return chosen
