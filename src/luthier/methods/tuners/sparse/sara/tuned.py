"""SaRA on a model: entries that are frozen during the run, and the nuclear-norm gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.methods.tuners._delta import oriented
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, PeftTunedModel, config_for
from luthier.processes import group

if TYPE_CHECKING:
    from luthier.model.network import Network


class SaRAModel(PeftTunedModel):
    """Entries that have grown are frozen at one point of the run; the optimizer state of the others
    is reset.
    """

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model, config_for(settings, model))
        self.sparse = {n: m for n, m in self.layers.items() if isinstance(m, DeltaLayer)}
        self.live: dict[str, Tensor] = {}  # module -> [k] which of its entries have not come to rest
        for name in self.sparse:
            values = self.parameters()[f"{name}.values"]
            self.live[name] = torch.ones(values.shape, dtype=torch.bool, device=values.device)
            values.register_hook(lambda grad, name=name: self.pulled(name, grad) * self.live[name])
        # a module, and what is added to its gradient in this step
        self.pull: tuple[str, Tensor] | None = None

    def memory(self):
        return {f"{n}.live": live for n, live in self.live.items()}

    def pulled(self, name: str, grad: Tensor) -> Tensor:
        """The gradient of the first micro-batch takes the pull along."""
        if self.pull is None or self.pull[0] != name:
            return grad
        pull, self.pull = self.pull[1], None
        return grad + pull.to(grad)

    @torch.no_grad()
    def before_step(self, clock):
        if self.settings.lambda_rank:
            large = [n for n, shape in self.shapes().items() if min(shape) > self.settings.min_side] or list(
                self.sparse
            )
            name = large[int(torch.randint(len(large), (1,), generator=clock.rng("sara")))]
            if group.current().main:  # gradients of processes add up, and it has the first micro-batch
                self.pull = name, self.nuclear(name) * self.settings.lambda_rank

    @torch.no_grad()
    def on_phase(self, clock):
        settings = self.settings
        due = clock.step == round(settings.progressive * clock.total) and settings.progressive < 1
        if clock.step == 0 or not due:
            return {}
        resets = {}
        for name, layer in self.sparse.items():
            p = layer.tensors(ADAPTER)
            self.live[name].logical_and_(settings.small(oriented(layer.get_base_layer()), p))
            resets[f"{name}.values"] = torch.ones_like(p.values, dtype=torch.bool)
        return resets

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """[out, in] of every tuned weight."""
        return {n: tuple(oriented(m.get_base_layer()).shape) for n, m in self.sparse.items()}

    def nuclear(self, name: str) -> Tensor:
        """[k] the gradient of the nuclear norm of a tuned weight where it moves: U V' at its places."""
        layer = self.sparse[name]
        p = layer.tensors(ADAPTER)
        U, _, Vh = torch.linalg.svd(
            self.settings.masked(oriented(layer.get_base_layer()), p), full_matrices=False
        )
        return (U @ Vh).flatten()[p.indices.long()]
