"""The modules that a sparse tuner's settings choose, before anything is inserted into the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.tuners_utils import check_target_module_exists as exists

from luthier.methods.tuners._peft import config_for
from luthier.model.linear import linear_modules

if TYPE_CHECKING:
    from luthier.model.network import Network


def chosen_modules(settings: Any, model: Network) -> dict[str, Any]:
    """The modules that `target_modules` and the other settings of TargetModules choose."""
    config = config_for(settings)
    head = model.get_output_embeddings()
    if config.target_modules == "all-linear":
        out = set(config.exclude_modules or ())
        return {
            n: m
            for n, m in linear_modules(model).items()
            if m is not head and not any(n == e or n.endswith(f".{e}") for e in out)
        }
    matches = {
        n: m for n, m in model.named_modules() if not isinstance(m, BaseTunerLayer) and exists(config, n)
    }
    return {n: m for n, m in matches.items() if isinstance(getattr(m, "weight", None), torch.Tensor)}
