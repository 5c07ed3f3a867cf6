"""SpIEL on a model: statistics gathered between exchanges, and the exchanges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.tuners._delta import oriented
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, PeftTunedModel, config_for

if TYPE_CHECKING:
    from luthier.model.network import Network


class SpIELModel(PeftTunedModel):
    """The statistics gathered for the next exchange belong to the state, so a run resumes within an
    interval.
    """

    def __init__(self, settings: Any, model: Network):
        if (
            settings.watches(0)
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
        ):
            raise RecipeError(
                f"tuner '{settings.name}': growth `ag` supports a single process only; with"
                " several use `selection_algorithm: ma`"
            )
        super().__init__(settings, model, config_for(settings, model))
        self.sparse = {n: m for n, m in self.layers.items() if isinstance(m, DeltaLayer)}
        self.gathered: dict[str, dict[str, Tensor]] = {}
        for name, layer in self.sparse.items():
            p, shape = layer.tensors(ADAPTER), tuple(oriented(layer.get_base_layer()).shape)
            stats = settings.nothing(shape, len(p.values), p.indices.dtype)
            self.gathered[name] = {k: t.to(p.values.device) for k, t in stats.items()}

    def memory(self):
        return {f"{n}.{k}": t for n, stats in self.gathered.items() for k, t in stats.items()}

    def on_phase(self, clock):
        method, share = self.settings, self.settings.share(clock.step, clock.total)
        resets: dict[str, Tensor] = {}
        for name, layer in self.sparse.items():
            p, stats = layer.tensors(ADAPTER), self.gathered[name]
            if share:
                resets[f"{name}.values"] = method.exchange(share, p.values, p.indices, stats)
            if method.begins(clock.step):
                for t in stats.values():
                    t.zero_()
        return resets

    def before_step(self, clock):
        method = self.settings
        for name, layer in self.sparse.items():
            stats = self.gathered[name]
            params = cast(Any, layer.adapter_params[ADAPTER])
            params.watch = (
                (lambda G, stats=stats: method.gather(G, stats)) if method.watches(clock.step) else None
            )

    def after_step(self, clock):
        for name, layer in self.sparse.items():
            p = layer.tensors(ADAPTER)
            if p.values.grad is not None:
                self.settings.follow(p.values.grad, p.indices, self.gathered[name])
