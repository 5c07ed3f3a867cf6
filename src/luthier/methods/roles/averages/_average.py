"""A running average of the trainable parameters, as mean teachers use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from luthier.methods.roles._base import Part


class Averaged(Part):
    """A tensor in fp32 for each trainable parameter; it starts at the policy's initial value. Subclasses
    define `after_step`.

    It follows the tuner's phases: where a tensor's name or shape changes, or some of its entries are reset,
    its average starts anew.
    """

    def __init__(self, tuned: Any):
        super().__init__()
        self.of = (tuned,)  # in a tuple: what is averaged is no part of this
        self.average: dict[str, Tensor] = {}
        self.follow()

    def trained(self) -> dict[str, Tensor]:
        """What is averaged: the tuner's parameters, without what roles brought."""
        return {name: p.detach() for name, p in self.of[0].parameters(parts=False).items()}

    def follow(self) -> None:
        """Averages of exactly the tensors that there are now; of new ones they begin here."""
        trained = self.trained()
        for name in [n for n, a in self.average.items() if n not in trained or a.shape != trained[n].shape]:
            self.end(name)
        for name, p in trained.items():
            if name not in self.average:
                self.begin(name, p)

    def begin(self, name: str, p: Tensor) -> None:
        """The average of a tensor begins."""
        self.average[name] = p.float().clone()

    def end(self, name: str) -> None:
        """A tensor is there no more."""
        del self.average[name]

    def restart(self, name: str, p: Tensor, mask: Tensor) -> None:
        """Entries of a tensor begin anew."""
        self.average[name][mask] = p.float()[mask]

    def memory(self) -> dict[str, Tensor]:
        return super().memory() | {f"{self.name}.{_flat(name)}": a for name, a in self.average.items()}

    def prepare_load(self, tensors: Mapping[str, Tensor]) -> None:
        self.follow()  # the tuner has taken the phase of what is loaded

    @torch.no_grad()
    def ready(self, rows: list[dict], roles: Any) -> None:
        self.follow()
        for name, p in self.trained().items():
            self.average[name].copy_(p)

    @torch.no_grad()
    def after_phase(self, resets: Mapping[str, Tensor]) -> None:
        self.follow()
        trained = self.trained()
        for name, mask in resets.items():
            self.restart(name, trained[name], mask)

    def tensors(self) -> dict[str, Tensor]:
        """The tuner's whole state, what trains as its average."""
        return self.of[0].state(parts=False) | self.average


def _flat(name: str) -> str:
    """The name of an average in a checkpoint has no dots."""
    return name.replace(".", "/")
