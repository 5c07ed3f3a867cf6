"""Answers that a model writes to the prompts of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def answers(
    who: Any, rows: Sequence[dict], roles: Any, draw: str, n: int, max_new_tokens: int, temperature: float
) -> list[list[str]]:
    """n answers of a policy to each row, as text. draw: names the draw of random numbers."""
    renderer = roles.renderer
    written = who.generate(
        [renderer.prompt(row) for row in rows],
        seeds=[roles.clock.derive_seed(draw, row["id"], at=0) for row in rows],
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop=renderer.stop_ids,
    )
    texts = []
    for samples in written:
        texts.append([renderer.answer(ids) for ids in samples])
    return texts
