"""The kind's protocol: how text is generated.

Most decoders change the logits before each token (`begin`); others have several models read along, search, or
ask again, and take over the whole generation (`generate`). `luthier.load(run).generate(prompt, decoder=...)`
and evaluator `generate` take one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from luthier.registry import family

# (logits [B, V], prompts [B] of token ids, responses so far [B] of token ids) -> logits [B, V]
Adjust = Callable[[Tensor, Sequence[Sequence[int]], Sequence[Sequence[int]]], Tensor]
Answers = list[list[list[int]]]  # of each prompt, of each of its samples: token ids


@family
class Decoder:
    """Family: settings that decide which token is written next."""

    def begin(self, renderer: Any) -> Adjust:
        """Called once before writing, with what turns text into tokens. What it returns is called before
        each token is chosen and may change the logits in place.
        """
        raise NotImplementedError

    def generate(
        self, roles: Any, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Sequence[int]], **how: Any
    ) -> Answers:
        """n completions of each prompt as token ids.

        rows: what the prompts were rendered from, for rewards. how: as `Policy.generate` takes it (seeds, n,
        max_new_tokens, temperature, top_p, top_k, stop, hear).
        """
        return roles.policy.generate(prompts, decoder=self.begin(roles.renderer), **how)
