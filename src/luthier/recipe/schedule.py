"""How the learning rate changes over a run: transformers' schedules, with their `lr_scheduler_kwargs`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from luthier.errors import RecipeError
from luthier.registry import did_you_mean

Factor = Callable[[int], float]


def constant() -> Callable[[float], float]:
    return lambda x: 1.0


def linear(min_lr_rate: float = 0.0) -> Callable[[float], float]:
    return lambda x: min_lr_rate + (1 - min_lr_rate) * (1 - x)


def cosine(num_cycles: float = 0.5, min_lr_rate: float = 0.0) -> Callable[[float], float]:
    """num_cycles: half a wave ends at the minimum."""

    def decay(x: float) -> float:
        wave = (1 + math.cos(2 * math.pi * num_cycles * x)) / 2
        return max(0.0, min_lr_rate + (1 - min_lr_rate) * wave)

    return decay


def cosine_with_restarts(num_cycles: int = 1, min_lr_rate: float = 0.0) -> Callable[[float], float]:
    """num_cycles: half waves, each from the full rate."""
    if num_cycles < 1:
        raise RecipeError(f"lr_scheduler_kwargs: num_cycles: {num_cycles} must be at least 1")

    def decay(x: float) -> float:
        wave = (1 + math.cos(math.pi * ((num_cycles * x) % 1.0))) / 2
        return min_lr_rate + (1 - min_lr_rate) * wave

    return decay


def polynomial(power: float = 1.0, min_lr_rate: float = 0.0) -> Callable[[float], float]:
    return lambda x: min_lr_rate + (1 - min_lr_rate) * (1 - x) ** power


def warmup_stable_decay(
    decay_ratio: float = 0.25, decay_type: str = "linear", min_lr_ratio: float = 0.0
) -> Callable[[float], float]:
    """decay_ratio: the share of the steps after warm-up in which the rate falls. decay_type: its shape."""
    shapes: dict[str, Callable[[float], float]] = {  # of the share that is left of the decay
        "linear": lambda left: left,
        "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
        "1-sqrt": lambda left: 1 - math.sqrt(1 - left),
    }
    if decay_type not in shapes or not 0 < decay_ratio <= 1:
        raise RecipeError(
            f"lr_scheduler_kwargs: decay_type must be one of {', '.join(shapes)}, and decay_ratio above 0"
        )
    shape = shapes[decay_type]

    def decay(x: float) -> float:
        left = min(1.0, (1 - x) / decay_ratio)
        return min_lr_ratio + (1 - min_lr_ratio) * shape(left)

    return decay


# name -> settings -> (share of the steps after warm-up that is done -> factor of the learning rate)
SCHEDULES: dict[str, Callable[..., Callable[[float], float]]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "cosine_with_min_lr": cosine,
    "polynomial": polynomial,
    "warmup_stable_decay": warmup_stable_decay,
}
# as transformers calls them
ALIASES = {"constant_with_warmup": "constant", "cosine_warmup_with_min_lr": "cosine_with_min_lr"}


def schedule(
    name: str,
    warmup_steps: float,
    total: int,
    settings: Mapping[str, Any] | None = None,
    learning_rate: float | None = None,
) -> Factor:
    """step -> factor of the learning rate, over `total` steps.

    Args:
        name: a key of SCHEDULES, or of ALIASES.
        warmup_steps: of linear warm-up; below 1 a share of the run.
        settings: lr_scheduler_kwargs. The least rate is `min_lr` (`lr_end` of polynomial), or `min_lr_rate`
            as a share of the learning rate.
        learning_rate: what `min_lr` is a share of.

    Raises:
        RecipeError: there is no schedule of that name, or it has no such setting.
    """
    decay = build_decay(ALIASES.get(name, name), dict(settings or {}), learning_rate)
    warmup = int(warmup_steps)
    if warmup_steps < 1:
        warmup = round(warmup_steps * total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return decay((step - warmup) / max(1, total - warmup))

    return factor


def build_decay(name: str, settings: dict[str, Any], learning_rate: float | None) -> Callable[[float], float]:
    """What follows on the warm-up."""
    if name not in SCHEDULES:
        hint = did_you_mean(name, (*SCHEDULES, *ALIASES))
        raise RecipeError(f"lr_scheduler_type: no schedule is named '{name}'{hint}")
    for least in ("min_lr", "lr_end"):
        if least in settings:
            rate = settings.pop(least)
            if not isinstance(rate, int | float) or rate < 0:
                raise RecipeError(f"lr_scheduler_kwargs: {least}: {rate!r} must be a learning rate")
            settings["min_lr_rate"] = min(1.0, rate / learning_rate) if learning_rate else 0.0
    if name == "cosine_with_min_lr" and "min_lr_rate" not in settings:
        raise RecipeError(
            "lr_scheduler_type: cosine_with_min_lr requires min_lr or min_lr_rate in lr_scheduler_kwargs"
        )
    for key, value in settings.items():
        if key != "decay_type" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RecipeError(f"lr_scheduler_kwargs: {key}: {value!r} must be a number")
    try:
        return SCHEDULES[name](**settings)
    except TypeError:
        words = SCHEDULES[name].__code__.co_varnames[: SCHEDULES[name].__code__.co_argcount]
        unknown = [key for key in settings if key not in words]
        choices = [*words, "min_lr"] if "min_lr_rate" in words else [*words]
        raise RecipeError(
            f"lr_scheduler_kwargs: schedule '{name}' has no setting {', '.join(unknown)}"
            f" (there is: {', '.join(choices) or 'none'})"
        ) from None
