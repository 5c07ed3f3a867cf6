"""The kind's protocol: what is added to the logits while text is generated.

`luthier.load(run).generate(prompt, decoder=...)` and evaluator `generate` take one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from luthier.registry import family

# (logits [B, V], prompts [B] of token ids, responses so far [B] of token ids) -> logits [B, V]
Adjust = Callable[[Tensor, Sequence[Sequence[int]], Sequence[Sequence[int]]], Tensor]


@family
class Decoder:
    """Family: settings that change which token is written next."""

    def begin(self, renderer: Any) -> Adjust:
        """Called once before writing, with what turns text into tokens. What it returns is called before
        each token is chosen and may change the logits in place.
        """
        raise NotImplementedError
