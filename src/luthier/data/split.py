"""Which rows are held out: by a hash of what they ask, so that a row keeps its side."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter

from luthier.errors import RecipeError

TOLERANCE = 0.2  # how far the share that the hash holds out may be from the recipe's, relative to that


def content_key(row: dict) -> str:
    """What makes two rows the same question: the prompt with its images and recordings, or where there is
    none the text, white space evened out. Of their paths the end counts: elsewhere the same files lie in
    another folder.
    """
    content = row.get("prompt") or row.get("completions") or ""
    if paths := media_of(row):
        content = [content, *("/".join(str(path).split("/")[-2:]) for path in paths)]
    if not isinstance(content, str):
        content = json.dumps(content, sort_keys=True, ensure_ascii=False, default=repr)
    return " ".join(content.split())


def media_of(row: dict) -> list:
    """The paths of a row's images, then of its recordings."""
    paths = []
    for name in ("images", "audios"):
        listed = row.get(name)
        if isinstance(listed, list):
            paths += listed
    return paths


def hash_fraction(text: str) -> float:
    """A number from 0 to 1 that follows from a text, alike on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split(rows: list[dict], fraction: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """(train, held out): that fraction of the rows held out, by a hash of their content key.

    The same prompt is never on both sides, and a row stays on its side when others come or go. Where the hash
    alone would hold out a fifth more or less than the fraction, as it does of few rows, the rows with the
    lowest hashes are held out instead, as many as the fraction says: at least one, and never all.
    """
    if not 0 <= fraction < 1:
        raise RecipeError(f"the held-out fraction must be at least 0 and below 1, not {fraction}")
    keys = [content_key(row) for row in rows]
    sizes = Counter(keys)
    position = {key: hash_fraction(f"{seed}\n{key}") for key in sizes}
    test_keys = {key for key, value in position.items() if value < fraction}
    count = held_out_count(len(rows), fraction)
    if abs(sum(sizes[key] for key in test_keys) - count) > TOLERANCE * count:
        test_keys = lowest(sizes, position, count)
    return divide(rows, keys, test_keys)


def sample(rows: list[dict], count: int) -> list[dict]:
    """`count` of the rows, in their order, by a hash of their content key: whatever the seed, runs are
    measured on the same ones.
    """
    if len(rows) <= count:
        return rows
    position = [hash_fraction(f"sample\n{content_key(row)}") for row in rows]
    chosen = sorted(range(len(rows)), key=position.__getitem__)[:count]
    return [rows[i] for i in sorted(chosen)]


def held_out_count(rows: int, fraction: float) -> int:
    """How many of so many rows a fraction is: at least one, and never all."""
    if not fraction:
        return 0
    return min(max(1, math.floor(rows * fraction + 0.5)), rows - 1)


def lowest(sizes: Counter[str], position: dict[str, float], count: int) -> set[str]:
    """The keys with the lowest hashes that together have at most `count` rows; where each has more, the one
    with the fewest. None where there is only one key.
    """
    if not count or len(sizes) < 2:
        return set()
    chosen: set[str] = set()
    for key in sorted(sizes, key=lambda key: position[key]):
        if sizes[key] <= count:
            chosen.add(key)
            count -= sizes[key]
    return chosen or {min(sizes, key=lambda key: (sizes[key], position[key]))}


def former_split(rows: list[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    """(train, held out) as version 0.1 split them, for runs that it began: by the hash alone, and nothing of
    fewer than four rows.
    """
    keys = [content_key(row) for row in rows]
    position = {key: hash_fraction(f"0\n{key}") for key in set(keys)}
    test_keys: set[str] = set()
    if len(rows) * fraction >= 4 and len(position) > 1:
        test_keys = {key for key, value in position.items() if value < fraction}
        if not test_keys:
            test_keys.add(min(position, key=lambda key: position[key]))
        elif len(test_keys) == len(position):
            test_keys.remove(max(position, key=lambda key: position[key]))
    return divide(rows, keys, test_keys)


def divide(rows: list[dict], keys: list[str], test_keys: set[str]) -> tuple[list[dict], list[dict]]:
    """(train, held out), by the key of each row."""
    train: list[dict] = []
    held_out: list[dict] = []
    for row, key in zip(rows, keys, strict=True):
        side = held_out if key in test_keys else train
        side.append(row)
    return train, held_out
