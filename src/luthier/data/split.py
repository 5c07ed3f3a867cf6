"""Which rows are held out: by a hash of what they ask, so that a row keeps its side."""

from __future__ import annotations

import hashlib
import json

from luthier.errors import RecipeError


def content_key(row: dict) -> str:
    """What makes two rows the same question: the prompt, or where there is none the text, white space evened
    out.
    """
    content = row.get("prompt") or row.get("completions") or ""
    if not isinstance(content, str):
        content = json.dumps(content, sort_keys=True, ensure_ascii=False, default=repr)
    return " ".join(content.split())


def hash_fraction(text: str) -> float:
    """A number from 0 to 1 that follows from a text, alike on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split(rows: list[dict], fraction: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """(train, held out): about `fraction` of the rows held out, by a hash of their content key.

    The same prompt is never on both sides, and a row stays on its side when others come or go. Where the hash
    would leave one side empty, the row nearest to it goes there.
    """
    if not 0 <= fraction < 1:
        raise RecipeError(f"the held-out fraction must be at least 0 and below 1, not {fraction}")
    keys = [content_key(row) for row in rows]
    position = {key: hash_fraction(f"{seed}\n{key}") for key in set(keys)}
    test_keys = {key for key, value in position.items() if value < fraction}
    if fraction and len(position) > 1:
        if not test_keys:
            test_keys.add(min(position, key=lambda key: position[key]))
        elif len(test_keys) == len(position):
            test_keys.remove(max(position, key=lambda key: position[key]))
    train: list[dict] = []
    held_out: list[dict] = []
    for row, key in zip(rows, keys, strict=True):
        side = held_out if key in test_keys else train
        side.append(row)
    return train, held_out
