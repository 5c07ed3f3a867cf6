"""Keys and values before those of every text: where they are stored, and which networks support them.

They are attached to the module that computes an attention's keys, where luthier's attention
(kernels/attention.py) looks for them. So every packed row attends to them, positions do not shift, and a KV
cache holds the text only.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.model.anatomy import INSIDE, part_of

if TYPE_CHECKING:
    from luthier.model.network import Network

# last names of what makes keys, alone or with queries and values
KEYS = "|".join(sorted(INSIDE["k"] | INSIDE["qkv"]))
STD = 0.3  # of keys and values at the start


def placed(settings: Any, name: str) -> Any:
    """A copy of a method's settings that knows what its module does in its layer."""
    copied = copy.copy(settings)
    object.__setattr__(copied, "part", part_of(name))
    return copied


def width(out_: int, in_: int, part: str | None) -> int:
    """Of the keys of one token: a fused module says queries as wide as what it reads, then keys and
    values.
    """
    return out_ if part == "k" else (out_ - in_) // 2


def drawn(m: int, wide: int) -> dict[str, Tensor]:
    return {"keys": torch.randn(m, wide) * STD, "values": torch.randn(m, wide) * STD}


def taken(model: Network, name: str) -> None:
    """Have a network take its attention from luthier."""
    from luthier.kernels.attention import NAME, takes_plans

    ready = takes_plans(model)
    # some parts have configs of their own
    kinds = {str(m.config._attn_implementation) for m in model.modules() if hasattr(m, "config")}
    if not ready or kinds != {NAME}:
        others = ", ".join(sorted(kinds - {NAME}))
        raise ValueError(
            f"{type(model).__name__} accepts no keys and values before the text (attention:"
            f" {others}); {name} needs a model whose parts all use transformers' sdpa attention"
            " and one config"
        )
