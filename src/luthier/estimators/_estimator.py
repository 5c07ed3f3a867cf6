"""Where a gradient comes from. An estimator calls `closure` as often as it likes and steps the chain once."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.clock import Clock
from luthier.method import family
from luthier.transforms._chain import Chain, Slots

Closure = Callable[..., float]


@family
class Estimator:
    """Family: one optimizer step."""

    def step(self, closure: Closure, chain: Chain, clock: Clock) -> float:
        """closure(grad=True) -> loss of the global batch; with grad, p.grad holds its gradient. Returns the loss."""
        raise NotImplementedError


def gradients(chain: Chain) -> dict[str, Slots]:
    """site -> slot -> gradient, as the last closure left them."""
    found: dict[str, Any] = {s.name: {k: p.grad for k, p in s.slots.items() if p.grad is not None} for s in chain.sites()}
    return {name: slots for name, slots in found.items() if slots}
