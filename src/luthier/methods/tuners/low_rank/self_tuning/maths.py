"""The best response of self-tuning factors: each factor as a function of the hyperparameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from luthier.errors import RecipeError

HYPER = ("dropout", "weight_decay")
DROPOUT, DECAY = 0, 1  # their places


def names(p: Any) -> list[str]:
    """The factors of a layer, in the order in which they are applied."""
    return [n for n in ("A", "B", "D") if hasattr(p, n)]


def responses(p: Any) -> tuple[Tensor, ...]:
    """Each factor at what the dial says: A + rows(V_A h) A_hyper."""
    return tuple(
        getattr(p, n) + (getattr(p, f"V_{n}") @ p.dial)[:, None] * getattr(p, f"{n}_hyper") for n in names(p)
    )


def placed(dial: Tensor, x: Tensor) -> Tensor:
    """The hyperparameters at each place of x [..., in]: [2] where all places answer to the same, else [...,
    2].

    dial: [2], or [R, W, 2] for x of R rows of W places, W = 1 where a row's places are all alike.
    """
    where = x.shape[:-1]
    if dial.ndim == 1 or len(where) == 2 and dial.shape[0] == where[0] and dial.shape[1] in (1, where[1]):
        return dial
    # networks that lay their rows end to end
    if len(where) == 1 and where[0] == dial.shape[0] * dial.shape[1]:
        return dial.flatten(0, 1)
    raise RecipeError(
        "tuner 'self_tuning' must know the row of each token, but a module (such as experts or"
        f" an output head) receives {list(where)} positions for a batch of"
        f" {list(dial.shape[:2])}; leave it out with exclude_modules"
    )


def rate(settings: Any, hyper: Tensor) -> Tensor:
    """The dropout that the first hyperparameter [..., 2] stands for."""
    return torch.sigmoid(hyper[..., DROPOUT] + math.log(settings.dropout / (1 - settings.dropout)))


def decay(settings: Any, hyper: Tensor) -> Tensor:
    """The weight decay that the second stands for."""
    return settings.weight_decay * torch.exp(hyper[..., DECAY])
