"""A Delta whose layers answer to hyperparameters that move with it: what tuner `self_tuning` is on a model."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.tuners._peft import ADAPTER, OnPeft, config_of, plain_settings
from luthier.tuners._tuner import Site
from luthier.tuners.self_tuning import HYPER, decay, rate, responses


class Responding(OnPeft):
    """A Delta on a model, and the hyperparameters that its layers answer to."""

    def __init__(self, settings: Any, network: Any):
        super().__init__(settings, network, config_of(type(settings))(**plain_settings(settings)))
        where = next(iter(self.held())).dial.device
        self.hyper = nn.Parameter(torch.zeros(len(HYPER), device=where), requires_grad=False)  # moved by the estimator alone
        self.log_sigma = nn.Parameter(torch.full((len(HYPER),), math.log(settings.sigma), device=where), requires_grad=False)

    def held(self):
        """The tensors of every layer."""
        return [layer.held[ADAPTER] for layer in self.layers.values() if hasattr(layer, "held")]

    def every_site(self):
        return [*self.found, Site("hyper", {"moved": self.hyper, "log_sigma": self.log_sigma}, None)]

    @contextmanager
    def answering(self, dropping: bool):
        """For a while every layer answers to `hyper` itself, so that a gradient reaches it; with dropout or without."""
        kept = [(t, dict(t._buffers)) for t in self.held()]
        try:
            for t, _ in kept:
                t._buffers["dial"], t._buffers["dropping"] = self.hyper, torch.tensor(float(dropping))
            yield
        finally:
            for t, was in kept:
                t._buffers.update(was)

    @torch.no_grad()
    def settle(self) -> None:
        """Outside of `answering`, layers answer to where the hyperparameters stand."""
        for t in self.held():
            t.dial.copy_(self.hyper)

    def size(self) -> Tensor:
        """The sum of squares of all that the hyperparameters make of the factors."""
        return sum((m.square().sum() for t in self.held() for m in responses(t)), torch.zeros(()))

    def values(self) -> dict[str, float]:
        """The hyperparameters as people know them."""
        return {
            "dropout": float(rate(self.settings, self.hyper.detach())),
            "weight_decay": float(decay(self.settings, self.hyper.detach())),
        }

    def read(self, folder):
        tensors = super().read(folder)
        dial = next(v for k, v in tensors.items() if k.endswith(".dial"))
        return {**tensors, "hyper.moved": dial.detach().clone()}
