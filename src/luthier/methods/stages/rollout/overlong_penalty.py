"""Lowers the scores of completions that come close to the limit of tokens: DAPO's soft overlong punishment.

0 up to max_new_tokens - cache tokens, then falling in a line to -1 at max_new_tokens.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage
from luthier.registry import stage


@stage(
    paper="arXiv:2503.14476",
    requires=[COMPLETIONS, SCORES],
    provides=[SCORES],
    removes=[PAIRS],
    use_when="answers are cut at the limit, and should rather become shorter before they reach it.",
    costs="counting tokens.",
)
class OverlongPenalty(Stage):
    """scores + scale * punishment of the completion's length in tokens."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # the rollout's limit, where the punishment is whole
    cache: Annotated[int, Field(ge=1)] = 32  # tokens before the limit in which it grows
    scale: Annotated[float, Field(ge=0)] = 1.0  # the whole punishment

    def __post_init__(self):
        if self.cache > self.max_new_tokens:
            raise ValueError(f"cache: {self.cache} tokens are more than the limit, {self.max_new_tokens}")

    def __call__(self, rows, roles):
        for row in rows:
            scores = []
            for ids, score in zip(row["completions"], row["scores"], strict=True):
                length = len(roles.renderer.tokenizer(ids).input_ids) if isinstance(ids, str) else len(ids)
                over = length - (self.max_new_tokens - self.cache)
                scores.append(score - self.scale * min(1.0, max(0.0, over / self.cache)))
            yield {**row, "scores": scores}
