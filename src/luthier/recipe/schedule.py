"""How the learning rate changes over a run."""

from __future__ import annotations

import math
from collections.abc import Callable

from luthier.errors import RecipeError
from luthier.registry import did_you_mean

# share of the steps after warmup that is done -> factor of the learning rate
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "warmup_stable_decay": lambda x: min(1.0, (1 - x) / 0.25),
}


def schedule(name: str, warmup_steps: float, total: int) -> Callable[[int], float]:
    """step -> factor of the learning rate, over `total` steps. warmup_steps below 1 is a share of the run.

    Raises RecipeError where there is no schedule of that name.
    """
    if name not in SCHEDULES:
        raise RecipeError(f"lr_scheduler_type: no schedule is named '{name}'{did_you_mean(name, SCHEDULES)}")
    decay = SCHEDULES[name]
    warmup = int(warmup_steps)
    if warmup_steps < 1:
        warmup = round(warmup_steps * total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return decay((step - warmup) / max(1, total - warmup))

    return factor
