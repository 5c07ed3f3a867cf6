"""What the rows of a batch have in common, by their tokens alone: a system prompt, tools, a document, the
first words of two answers.

Segments become stretches of a trie: one that several segments begin with stands once, and what follows it is
theirs. A causal network's state at a token depends on the tokens up to it, so it is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from luthier.model.batch import Batch

# tokens that a common stretch must save to be cut from what follows: short pieces make attention slower
LEAST = 32
# tokens, and share of a batch's tokens, that all stretches must save where it is decided by itself
WORTH = 256
WORTH_SHARE = 0.1
WINDOW = 256  # tokens that are compared at once

Cursor = tuple[int, int]  # a segment, and its first token that has no place yet


@dataclass(frozen=True)
class Stretch:
    """Tokens that are read once: `size` of a segment from its token `first` on, and of others with the same
    beginning.
    """

    segment: int
    first: int
    size: int
    parent: int  # index in its block of the stretch that it continues; -1: none
    others: tuple[Cursor, ...] = ()  # where else these tokens stand


def common_stretches(batch: Batch, *, least: int = LEAST, whole_roots: bool = False) -> list[list[Stretch]]:
    """The trie of a batch: a block for each root, parents first.

    least: tokens that a common stretch must save. whole_roots: share roots that are equal as a whole, and no
    parts of them (they are read from both sides, so each state depends on all of a root).
    """
    return _Builder(batch, least, whole_roots).blocks()


def tokens_saved(batch: Batch, blocks: Sequence[Sequence[Stretch]]) -> int:
    """How many of a batch's tokens stand where another stands."""
    return len(batch.ids) - sum(stretch.size for block in blocks for stretch in block)


def worth_it(batch: Batch, saved: int) -> bool:
    """Does a trie that saves so many tokens pay for the shorter pieces that it makes?"""
    return saved >= max(WORTH, WORTH_SHARE * len(batch.ids))


class _Builder:
    def __init__(self, batch: Batch, least: int, whole_roots: bool):
        source = batch
        if batch.host is not None and not batch.altered:
            source = batch.host
        self.ids = source.ids.cpu().numpy()
        self.sizes, self.least, self.whole_roots = batch.sizes, least, whole_roots
        self.starts = np.cumsum([0, *batch.sizes]).tolist()
        self.children: dict[int, list[Cursor]] = {}
        for segment, parent in enumerate(batch.parents):
            self.children.setdefault(parent, []).append((segment, 0))

    def blocks(self) -> list[list[Stretch]]:
        blocks: list[list[Stretch]] = []
        roots = self.whole(self.children[-1]) if self.whole_roots else self.alike(self.children[-1])
        for root in roots:
            block: list[Stretch] = []
            # no recursion: rows that each go on from the last make a deep trie
            waiting = [(*root, -1)]
            while waiting:
                cursors, size, parent = waiting.pop()
                (segment, first), *others = cursors
                block.append(Stretch(segment, first, size, parent, tuple(others)))
                below = list(self.alike([(s, start + size) for s, start in cursors]))
                waiting += [(*group, len(block) - 1) for group in reversed(below)]
            blocks.append(block)
        return blocks

    def whole(self, roots: Sequence[Cursor]) -> Iterator[tuple[list[Cursor], int]]:
        """Roots that are equal from end to end."""
        equal: dict[tuple[bytes, bool], list[Cursor]] = {}
        for segment, _ in roots:
            tokens = self.ids[self.starts[segment] : self.starts[segment + 1]]
            # a root that nothing continues is read from left to right
            key = (tokens.tobytes(), segment in self.children)
            equal.setdefault(key, []).append((segment, 0))
        for group in equal.values():
            yield group, self.sizes[group[0][0]]

    def alike(self, cursors: Sequence[Cursor]) -> Iterator[tuple[list[Cursor], int]]:
        """What goes on from one place, sorted by how it begins: groups, and how many tokens are common."""
        going: list[Cursor] = []
        waiting = list(reversed(cursors))
        while waiting:
            segment, first = waiting.pop()
            if first < self.sizes[segment]:
                going.append((segment, first))
            else:  # at its end, those that continue it go on
                waiting += reversed(self.children.get(segment, ()))
        groups = [(going, 0)]  # with the number of tokens by which they were sorted
        while groups:
            group, sorted_by = groups.pop()
            size = self.common(group, sorted_by) if group else 0
            if len(group) == 1 or size and (len(group) - 1) * size >= self.least:
                yield group, size
            elif group:
                groups += [(part, size + 1) for part in reversed(self.by_token(group, size))]

    def by_token(self, group: Sequence[Cursor], ahead: int) -> list[list[Cursor]]:
        """Sorted by the token that stands so far ahead; segments that are shorter stay alone."""
        parts: dict[tuple[int, int], list[Cursor]] = {}
        for i, (segment, first) in enumerate(group):
            if first + ahead < self.sizes[segment]:
                key = (0, int(self.ids[self.starts[segment] + first + ahead]))
            else:
                key = (1, i)
            parts.setdefault(key, []).append((segment, first))
        return list(parts.values())

    def common(self, group: Sequence[Cursor], size: int) -> int:
        """How many tokens all of these begin with, `size` of which were compared already."""
        places = np.array([self.starts[segment] + first for segment, first in group])
        longest = min(self.sizes[segment] - first for segment, first in group)
        if len(group) == 1:
            return longest
        while size < longest:
            ahead = np.arange(size, min(size + WINDOW, longest))
            tokens = self.ids[places[:, None] + ahead]
            differs = (tokens != tokens[0]).any(0)
            if differs.any():
                return size + int(differs.argmax())
            size += len(ahead)
        return size
