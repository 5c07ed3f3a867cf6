"""Compacter on a model: one tensor that all adapters share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, PeftTunedModel, config_for

if TYPE_CHECKING:
    from luthier.model.network import Network


class CompacterModel(PeftTunedModel):
    """One tensor is shared by all modules, and takes the first module's initial value. The adapter file
    repeats it.
    """

    def __init__(self, settings: Any, model: Network, slot: str):
        super().__init__(settings, model, config_for(settings, model))
        params = [
            cast(Any, m.adapter_params[ADAPTER]) for m in self.layers.values() if isinstance(m, DeltaLayer)
        ]
        for tensors in params[1:]:
            setattr(tensors, slot, getattr(params[0], slot))
