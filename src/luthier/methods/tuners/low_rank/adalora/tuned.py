"""Layers whose ranks are reallocated during training (AdaLoRA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, PeftTunedModel, config_for
from luthier.model.network import Network

SLOTS = ("A", "E", "B")


class AdaLoRAModel(PeftTunedModel):
    """The statistics of importance belong to the state, so a resumed run allocates ranks as an uninterrupted
    one.
    """

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model, config_for(settings, model))
        self.ranked = {name: layer for name, layer in self.layers.items() if isinstance(layer, DeltaLayer)}
        self.smoothed: dict[str, Tensor] = {}
        for name, layer in self.ranked.items():
            p = layer.tensors(ADAPTER)
            self.smoothed |= {
                f"{name}.{slot}.{what}": torch.zeros_like(getattr(p, slot))
                for slot in SLOTS
                for what in ("importance", "uncertainty")
            }

    def memory(self):
        return self.smoothed

    @torch.no_grad()
    def after_step(self, clock):
        how, step = self.settings, clock.step + 1
        if step < clock.total - round(how.tfinal * clock.total):
            for name, layer in self.ranked.items():
                p = layer.tensors(ADAPTER)
                for slot in SLOTS:
                    number = getattr(p, slot)
                    if number.grad is not None:  # no row reached this module (an expert)
                        self._follow(f"{name}.{slot}", (number * number.grad).abs())
        budget = how.budget(step, clock.total, len(self.ranked))
        if budget is not None:
            self._allocate(budget)

    def _follow(self, name: str, sensitivity: Tensor) -> None:
        importance, uncertainty = self.smoothed[f"{name}.importance"], self.smoothed[f"{name}.uncertainty"]
        importance.lerp_(sensitivity, 1 - self.settings.beta1)
        uncertainty.lerp_((sensitivity - importance).abs(), 1 - self.settings.beta2)

    def _allocate(self, budget: int) -> None:
        """The `budget` most important triplets of all modules keep their E."""
        scores = torch.cat([self._scores(name) for name in self.ranked])
        keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device).index_fill_(
            0, scores.topk(budget).indices, True
        )
        for layer, mine in zip(self.ranked.values(), keep.split(self.settings.init_r), strict=True):
            layer.tensors(ADAPTER).E.masked_fill_(~mine, 0.0)

    def _scores(self, name: str) -> Tensor:
        a, e, b = (
            self.smoothed[f"{name}.{slot}.importance"] * self.smoothed[f"{name}.{slot}.uncertainty"]
            for slot in SLOTS
        )
        return e + a.mean(1) + b.mean(0)
