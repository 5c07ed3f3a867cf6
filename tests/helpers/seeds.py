"""Other draws than those that a test was written with."""

from __future__ import annotations

from typing import Any

import torch

from luthier.clock import Clock


def shift_seeds(by: int) -> None:
    """Every seed of torch's global generator and of runs' clocks, moved by this; 0 changes nothing."""
    if not by:
        return
    manual_seed, derive_seed = torch.manual_seed, Clock.derive_seed

    def other_seed(seed: int) -> torch.Generator:
        return manual_seed(int(seed) + 7919 * by)

    def other_draw(clock: Clock, *names: Any, at: int | None = None) -> int:
        return derive_seed(clock, *names, by, at=at)

    torch.manual_seed = other_seed
    Clock.derive_seed = other_draw
