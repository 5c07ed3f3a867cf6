"""The intrinsic-dimension tuner on a model: one vector that all modules share."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from luthier.errors import RecipeError
from luthier.methods.tuners._delta import oriented
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, PeftTunedModel, config_for
from luthier.methods.tuners.low_rank.intrinsic_dimension.fastfood import Maps

if TYPE_CHECKING:
    from luthier.model.network import Network


class IntrinsicDimensionModel(PeftTunedModel):
    """The parameter `theta` is shared by all modules. The adapter file repeats it, so that any reader finds
    it.
    """

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model, config_for(settings, model))
        layers = {n: m for n, m in self.layers.items() if isinstance(m, DeltaLayer)}
        numbers = sum(oriented(m.get_base_layer()).numel() for m in layers.values())
        self.settings = filled = replace(settings, modules=len(layers), numbers=numbers)
        if filled.length < 1:
            raise RecipeError(
                f"tuner '{settings.name}': d: {settings.d} is not enough for a scale per module"
                f" ({len(layers)} modules) and at least one more; raise d, or set"
                " structure_aware: false"
            )
        object.__setattr__(filled, "maps", Maps(filled.cache_gb * 2**30))
        config = cast(Any, self.peft.peft_config[ADAPTER])
        config.modules, config.numbers = filled.modules, filled.numbers
        theta = nn.Parameter(
            torch.zeros(filled.length, device=next(iter(layers.values())).get_base_layer().weight.device)
        )
        for name, layer in layers.items():
            layer.methods[ADAPTER] = filled.at(name)
            cast(Any, layer.adapter_params[ADAPTER]).theta = theta
