"""A batch's tree of segments as rows of a tensor: packed without padding between them, each prompt read once
if shared.

Loops run over segments, never over tokens.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from luthier.kernels.layout import Layout
from luthier.kernels.transfer import to_device
from luthier.model.batch import Batch

# a segment, and the index in its block of the segment that it continues (-1: none)
Member = tuple[int, int]


@dataclass(frozen=True)
class _Piece:
    """A placed segment."""

    segment: int  # -1: the soft prompt
    index: int
    place: int  # flat position of its first token
    start: int  # position of its first token in its sequence
    size: int
    above: _Piece | None  # what it continues

    @property
    def last_above(self) -> int:
        """Flat position of the token before its first one, -1 where there is none. An empty piece passes the
        question on.
        """
        above = self.above
        while above is not None and not above.size:
            above = above.above
        if above is None:
            return -1
        return above.place + above.size - 1


def lay_out(
    batch: Batch, *, share: bool = True, width: int = 0, virtual: int = 0, prefix: bool = False
) -> Layout:
    """Pack the batch's tree into rows of at least `width` positions; `virtual` positions precede every root.

    share: read a prompt once for all its completions, else once for each. width 0: one sequence per row
    (padded). prefix: the segments that rows begin with, where others continue them, are read from both sides.
    """
    sizes, parents = batch.sizes, batch.parents
    blocks = _blocks(parents, share)
    lengths = []
    for block in blocks:
        lengths.append(virtual + sum(sizes[s] for s, _ in block))
    if width:
        width = max(width, *lengths)
    rows = _pack(lengths, width)
    wide = 0
    for row in rows:
        wide = max(wide, sum(lengths[b] for b in row))
    pieces = _pieces(blocks, rows, sizes, wide, virtual)

    size = torch.tensor([p.size for p in pieces])
    which = torch.repeat_interleave(torch.arange(len(pieces)), size)  # piece of each placed token
    inner = torch.arange(len(which)) - torch.repeat_interleave(size.cumsum(0) - size, size)
    table = torch.tensor([(p.segment, p.start, p.place, p.last_above) for p in pieces])
    segment, start, place, last = table.unbind(1)
    flat = place[which] + inner
    first = torch.tensor([0, *sizes]).cumsum(0)  # first token of each segment in batch.ids
    real = segment[which] >= 0
    token = torch.where(real, first[segment[which]] + inner, 0)

    def spread(values: Tensor, fill: int) -> Tensor:
        out = torch.full((len(rows) * wide,), fill)
        return out.index_copy_(0, flat, values).view(len(rows), wide)

    at = torch.full((len(batch.ids),), -1)
    at[token[real]] = torch.where(inner == 0, last[which], flat - 1)[real]
    continued = set(parents)
    sees = torch.eye(len(pieces), dtype=torch.bool)
    both = torch.zeros(len(pieces), dtype=torch.bool)
    for p in pieces:
        if p.above is not None:
            sees[p.index] |= sees[p.above.index]
        if prefix and p.segment >= 0:
            both[p.index] = parents[p.segment] < 0 and p.segment in continued
    tensors = {
        "source": spread(token, 0),
        "position": spread(start[which] + inner, 0),
        "piece": spread(which, -1),
        "soft": spread(torch.where(real, -1, inner), -1),
        "at": at,
        "sees": sees,
        "both": both,
    }
    layout = Layout(**tensors)
    if batch.ids.device.type == "cpu":
        return layout
    return replace(layout, host=layout, **to_device(tensors, batch.ids.device))


def _pieces(
    blocks: list[list[Member]], rows: list[list[int]], sizes: list[int], width: int, virtual: int
) -> list[_Piece]:
    """Every segment at its place. rows: the blocks of each row; width: positions of a row."""
    pieces: list[_Piece] = []
    for r, row in enumerate(rows):
        place = r * width
        for b in row:
            root = None
            if virtual:
                root = _Piece(-1, len(pieces), place, 0, virtual, None)
                pieces.append(root)
                place += virtual
            first = len(pieces)  # of this block
            for s, parent in blocks[b]:
                above = pieces[first + parent] if parent >= 0 else root
                start = 0 if above is None else above.start + above.size
                pieces.append(_Piece(s, len(pieces), place, start, sizes[s], above))
                place += sizes[s]
    return pieces


def _blocks(parents: list[int], share: bool) -> list[list[Member]]:
    """Segments that are read together, parents first."""
    children = defaultdict(list)
    for s, parent in enumerate(parents):
        children[parent].append(s)
    blocks: list[list[Member]] = []

    def add_tree(s: int, parent: int, block: list[Member]) -> None:
        block.append((s, parent))
        own = len(block) - 1
        for child in children[s]:
            add_tree(child, own, block)

    def add_paths(s: int, above: list[int]) -> None:
        path = [*above, s]
        for child in children[s]:
            add_paths(child, path)
        if not children[s]:
            block = []
            for i, x in enumerate(path):
                block.append((x, i - 1))
            blocks.append(block)

    for root in children[-1]:
        if share:
            block: list[Member] = []
            add_tree(root, -1, block)
            blocks.append(block)
        else:
            add_paths(root, [])
    return blocks


def _pack(sizes: list[int], width: int) -> list[list[int]]:
    """First fit, longest first; width 0 puts every block on its own row, in order."""
    if not width:
        return [[b] for b in range(len(sizes))]
    rows: list[list[int]] = []
    room: list[int] = []
    for b in sorted(range(len(sizes)), key=lambda b: -sizes[b]):
        for r, free in enumerate(room):
            if free >= sizes[b]:
                rows[r].append(b)
                room[r] -= sizes[b]
                break
        else:
            rows.append([b])
            room.append(width - sizes[b])
    return rows
