"""Adapters whose weights a small network generates for each task, on a model: its tensors are shared by all
layers, and rows name their tasks. The adapter file repeats what is shared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from luthier.methods.tuners._peft import ADAPTER, DeltaLayer
from luthier.methods.tuners.mixture._routed import NamedRows

if TYPE_CHECKING:
    from luthier.model.network import Network


class GeneratedModel(NamedRows):
    """The slots that the settings list in `shared` are one tensor for all layers where it has one shape; it
    begins as the first layer's.
    """

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model)
        first: dict[tuple[str, Any], Any] = {}
        for layer in self.layers.values():
            if not isinstance(layer, DeltaLayer):
                continue
            params = cast(Any, layer.adapter_params[ADAPTER])
            for slot in settings.shared:
                if hasattr(params, slot):
                    own = getattr(params, slot)
                    setattr(params, slot, first.setdefault((slot, own.shape), own))
