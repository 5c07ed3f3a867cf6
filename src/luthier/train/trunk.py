"""What all rows begin with, read once for a whole run by layers that do not train: its states, and the keys
and values that what follows looks back at.

It depends on its tokens alone, never on a batch, so a resumed run reads the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn

from luthier.model.batch import Batch

LEAST = 64  # tokens
FULL = {"full_attention"}


@dataclass(frozen=True)
class Trunk:
    """m tokens that rows begin with."""

    tokens: Tensor  # [m]
    states: Tensor  # [m, d] behind the layers that were read
    # name of an attention module below the list of layers -> keys and values [m, K * d]
    prefixes: dict[str, tuple[Tensor, Tensor]]

    def begins(self, tree: Batch) -> bool:
        """Does the root of this tree begin with these tokens, and go on or is continued?"""
        size = len(self.tokens)
        if len(tree.ids) == size or tree.sizes[0] < size:
            return False
        return torch.equal(tree.ids[:size].cpu(), self.tokens)

    def rest(self, tree: Batch) -> Batch:
        """A tree without these tokens."""
        size = len(self.tokens)
        cut = {name: getattr(tree, name)[size:] for name in ("ids", "labels", "supervised", "segment")}
        return replace(tree, host=None, read={}, metrics={}, **cut)

    @contextmanager
    def before(self, layers: nn.ModuleList) -> Iterator[None]:
        """Meanwhile every token looks back at these, too."""
        modules = [layers.get_submodule(name) for name in self.prefixes]
        for module, (key, value) in zip(modules, self.prefixes.values(), strict=True):
            module.add_module("trunk", _KeysAndValues(key, value))
        try:
            yield
        finally:
            for module in modules:
                del module.trunk


class _KeysAndValues(nn.Module):
    """A part of an attention module (kernels/attention.prefix_of)."""

    def __init__(self, key: Tensor, value: Tensor):
        super().__init__()
        self.pair = key, value

    def prefix_kv(self) -> tuple[Tensor, Tensor]:
        """[m, K * d] each."""
        return self.pair


def common_tokens(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all these begin with, where it is long."""
    tokens = list(commonprefix([list(prompt) for prompt in prompts]))
    return tokens if len(tokens) >= LEAST else []


def why_no_trunk(architecture: Any, model: Any) -> str | None:
    """Why layers cannot look back at keys and values of tokens read elsewhere; None where they can."""
    config = model.config.get_text_config()
    if not architecture.in_blocks(model) or architecture.prefix:
        return "attention is not causal and block by block"
    if {*(getattr(config, "layer_types", None) or FULL)} != FULL or getattr(config, "sliding_window", None):
        return "some layers do not look back at all that was read"
    if any(hasattr(module, "prefix_kv") for module in model.modules()):
        return "the tuner puts keys and values before every text"
    return None


class Recorder:
    """Keys and values of every attention that a plan is handed to."""

    def __init__(self, layers: nn.ModuleList):
        self.names = {module: name for name, module in layers.named_modules()}
        self.prefixes: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        flat = [x[0].transpose(0, 1).flatten(1).clone() for x in (key, value)]
        self.prefixes[self.names[module]] = flat[0], flat[1]
