"""What tests of objectives_more share."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from helpers.models import make_tokenizer
from luthier.clock import Clock
from luthier.registry import build


def roles(step: int = 0):
    tokenizer = make_tokenizer()
    text = lambda ids, special=False: tokenizer.decode(ids)
    return SimpleNamespace(
        clock=Clock(seed=1), renderer=SimpleNamespace(tokenizer=tokenizer, text=text), warn=lambda s: None
    )


def combined(name: str, grads: torch.Tensor) -> torch.Tensor:
    share = build("estimator", name).combine(
        grads.double() @ grads.double().T, torch.ones(len(grads)), torch.Generator().manual_seed(0)
    )
    return share.float() @ grads
