"""An average of what a tuner may move, beside it: what mean teachers keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.methods.roles._base import Part


class Averaged(Part):
    """A buffer in fp32 for each tensor that may move; it begins at the policy's start. Subclasses say
    `after_step`.
    """

    def __init__(self, attached: Any):
        super().__init__()
        self.of = (attached,)  # in a tuple: what is averaged is no part of this
        for name, p in self.moving():
            self.register_buffer(name, p.detach().float().clone())

    def moving(self) -> list[tuple[str, Tensor]]:
        """(name of its buffer, tensor) of what may move. A buffer's name has no dots."""
        return [(k.replace(".", "/"), p) for k, p in self.of[0].parameters().items()]

    @torch.no_grad()
    def ready(self, rows: list[dict], roles: Any) -> None:
        for name, p in self.moving():
            self.get_buffer(name).copy_(p)

    def tensors(self) -> dict[str, Tensor]:
        """The tuner's whole state, what moves as its average."""
        attached = self.of[0]
        return attached._state() | {k: self.get_buffer(k.replace(".", "/")) for k in attached.parameters()}
