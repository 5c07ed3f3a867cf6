"""Rows that begin alike meet in micro-batches, so that what they have in common is read once
(model/trie.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

COMMON = 256  # letters that rows begin with in common, from which on they are sorted by them


def clusters(rows: Sequence[Mapping]) -> tuple[int, ...] | None:
    """A number for each row, the same where half of two rows' tools and prompts is the same beginning; None
    where all rows or none have one in common.
    """
    texts = [f"{row.get('tools') or ''}{row['prompt']}" for row in rows]
    order = sorted(range(len(rows)), key=texts.__getitem__)
    numbers, number = [0] * len(rows), 0
    for one, other in pairwise(order):
        common = common_letters(texts[one], texts[other])
        if common < max(COMMON, min(len(texts[one]), len(texts[other])) / 2):
            number += 1
        numbers[other] = number
    if not 0 < number < len(rows) - 1:
        return None
    return tuple(numbers)


def common_letters(one: str, other: str) -> int:
    """How many letters two texts begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def adjacent(indices: Sequence[int], numbers: Sequence[int]) -> list[int]:
    """The rows of a step with those of one cluster behind each other."""
    first: dict[int, int] = {}
    for i in indices:
        first.setdefault(numbers[i], len(first))
    return sorted(indices, key=lambda i: first[numbers[i]])


def grouped(
    order: Sequence[int], numbers: Sequence[int], per_step: int, begun: int, seed: int
) -> tuple[int, ...]:
    """An epoch's order in which the rows of a step are of one cluster as long as there are enough of it; the
    seed decides when their turn is. The first `begun` rows fill up the step that the epoch before began.
    """
    waiting: dict[int, list[int]] = {}
    steps: list[list[int]] = []
    for i in order:
        rows = waiting.setdefault(numbers[i], [])
        rows.append(i)
        if len(rows) == per_step:
            steps.append(waiting.pop(numbers[i]))
    rest = [i for rows in waiting.values() for i in rows]
    while len(rest) < begun and steps:
        rest += steps.pop()
    turns = torch.randperm(len(steps), generator=torch.Generator().manual_seed(seed)).tolist()
    arranged = rest[:begun]
    for turn in turns:
        arranged += steps[turn]
    return (*arranged, *rest[begun:])
