"""The modules that a tuner's settings choose, before anything is inserted into the model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.tuners_utils import check_target_module_exists as exists

from luthier.methods.tuners._peft.registration import config_for
from luthier.methods.tuners._peft.targets import ends_one
from luthier.model.linear import linear_modules, uncalled_modules

if TYPE_CHECKING:
    from luthier.model.network import Network


def chosen_modules(settings: Any, model: Network) -> dict[str, Any]:
    """The modules that `target_modules` and the other settings of TargetModules choose."""
    config = config_for(settings, model)
    chosen = {}
    if config.target_modules == "all-linear":
        head, left_out = model.get_output_embeddings(), uncalled_modules(model)
        for name, module in linear_modules(model).items():
            if module is not head and name not in left_out and not _excluded(name, config.exclude_modules):
                chosen[name] = module
        return chosen
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) or not exists(config, name):
            continue
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            chosen[name] = module
    return chosen


def _excluded(name: str, exclude: Any) -> bool:
    """By a regular expression of whole names, or a list of their ends."""
    if isinstance(exclude, str):
        return re.fullmatch(exclude, name) is not None
    return any(ends_one(end, [name]) for end in exclude or ())
