"""A batch's tree of segments as rows of a tensor: packed without padding between them; a prompt is read once
for its completions, and so is what several rows begin with (trie.py).

Loops run over segments, never over tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from luthier.kernels.layout import Layout
from luthier.kernels.transfer import to_device
from luthier.model.batch import Batch
from luthier.model.trie import LEAST, Stretch, common_stretches, tokens_saved, worth_it

Blocks = list[list[Stretch]]
# is every row read by itself, whatever it has in common with others?
ROWS_APART: ContextVar[bool] = ContextVar("rows_apart", default=False)


@contextmanager
def rows_apart() -> Iterator[None]:
    """For a while no two rows share tokens: for whoever counts what modules read, or needs the gradients of
    single rows.
    """
    token = ROWS_APART.set(True)
    try:
        yield
    finally:
        ROWS_APART.reset(token)


@dataclass(frozen=True)
class _Piece:
    """A placed stretch."""

    stretch: Stretch | None  # None: the soft prompt
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
    batch: Batch,
    *,
    share: bool = True,
    width: int = 0,
    virtual: int = 0,
    prefix: bool = False,
    merge: bool | Literal["auto"] = False,
) -> Layout:
    """Pack the batch's tree into rows of at least `width` positions; `virtual` positions precede every root.

    share: read a prompt once for all its completions, else once for each. width 0: one sequence per row
    (padded). prefix: the segments that rows begin with, where others continue them, are read from both sides.
    merge: read once what several rows begin with; auto: where that saves enough.
    """
    sizes, parents = batch.sizes, batch.parents
    blocks = _blocks(parents, sizes, share)
    rows, wide = _placed(blocks, width, virtual)
    saved = 0
    if merge and share and width:
        common = common_stretches(batch, least=LEAST if merge == "auto" else 1, whole_roots=prefix)
        saved = tokens_saved(batch, common)
        common_rows, common_wide = _placed(common, width, virtual)
        # a mask over rows takes the square of their width
        larger = len(common_rows) * common_wide**2 > len(rows) * wide**2
        if larger or merge == "auto" and not worth_it(batch, saved):
            saved = 0
        if saved:
            blocks, rows, wide = common, common_rows, common_wide
    pieces = _pieces(blocks, rows, wide, virtual)

    size = torch.tensor([p.size for p in pieces])
    which = torch.repeat_interleave(torch.arange(len(pieces)), size)  # piece of each placed token
    inner = torch.arange(len(which)) - torch.repeat_interleave(size.cumsum(0) - size, size)
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()  # first token of each segment in batch.ids
    table = torch.tensor([(_first(p, starts), p.start, p.place, p.last_above) for p in pieces])
    first, start, place, last = table.unbind(1)
    flat = place[which] + inner
    real = first[which] >= 0
    token = torch.where(real, first[which] + inner, 0)
    before = torch.where(inner == 0, last[which], flat - 1)

    def spread(values: Tensor, fill: int) -> Tensor:
        out = torch.full((len(rows) * wide,), fill)
        return out.index_copy_(0, flat, values).view(len(rows), wide)

    at = torch.full((len(batch.ids),), -1)
    where = torch.full((len(batch.ids),), -1)
    at[token[real]] = before[real]
    where[token[real]] = flat[real]
    if saved:
        alike, own = _alike(pieces, starts)
        at[alike], where[alike] = at[own], where[own]
    sees, both = _visible(pieces, parents, prefix)
    tensors = {
        "source": spread(token, 0),
        "position": spread(start[which] + inner, 0),
        "piece": spread(which, -1),
        "soft": spread(torch.where(real, -1, inner), -1),
        "at": at,
        "place": where,
        "sees": sees,
        "both": both,
    }
    layout = Layout(**tensors, saved=saved, host=None)
    if batch.ids.device.type == "cpu":
        return layout
    return replace(layout, host=layout, **to_device(tensors, batch.ids.device))


def _visible(pieces: list[_Piece], parents: list[int], prefix: bool) -> tuple[Tensor, Tensor]:
    """[P, P] which piece continues which, [P] which are read from both sides."""
    continued = set(parents)
    sees = torch.eye(len(pieces), dtype=torch.bool)
    both = torch.zeros(len(pieces), dtype=torch.bool)
    for p in pieces:
        if p.above is not None:
            sees[p.index] |= sees[p.above.index]
        if prefix and p.stretch is not None:
            both[p.index] = parents[p.stretch.segment] < 0 and p.stretch.segment in continued
    return sees, both


def _first(piece: _Piece, starts: list[int]) -> int:
    """Index in batch.ids of a piece's first token, -1 for a soft prompt."""
    if piece.stretch is None:
        return -1
    return starts[piece.stretch.segment] + piece.stretch.first


def _alike(pieces: list[_Piece], starts: list[int]) -> tuple[Tensor, Tensor]:
    """Indices in batch.ids of tokens that have no place of their own, and of those at whose they stand."""
    others = []
    for p in pieces:
        if p.stretch is not None:
            own = _first(p, starts)
            others += [(starts[segment] + begin, own, p.size) for segment, begin in p.stretch.others]
    first, own, size = torch.tensor(others).unbind(1)
    inner = torch.arange(int(size.sum())) - torch.repeat_interleave(size.cumsum(0) - size, size)
    return torch.repeat_interleave(first, size) + inner, torch.repeat_interleave(own, size) + inner


def _placed(blocks: Blocks, width: int, virtual: int) -> tuple[list[list[int]], int]:
    """The blocks of each row, and the positions of a row."""
    lengths = []
    for block in blocks:
        lengths.append(virtual + sum(stretch.size for stretch in block))
    if width:
        width = max(width, *lengths)
    rows = _pack(lengths, width)
    wide = 0
    for row in rows:
        wide = max(wide, sum(lengths[b] for b in row))
    return rows, wide


def _pieces(blocks: Blocks, rows: list[list[int]], width: int, virtual: int) -> list[_Piece]:
    """Every stretch at its place. rows: the blocks of each row; width: positions of a row."""
    pieces: list[_Piece] = []
    for r, row in enumerate(rows):
        place = r * width
        for b in row:
            root = None
            if virtual:
                root = _Piece(None, len(pieces), place, 0, virtual, None)
                pieces.append(root)
                place += virtual
            begin = len(pieces)  # of this block
            for stretch in blocks[b]:
                above = pieces[begin + stretch.parent] if stretch.parent >= 0 else root
                start = 0 if above is None else above.start + above.size
                pieces.append(_Piece(stretch, len(pieces), place, start, stretch.size, above))
                place += stretch.size
    return pieces


def _blocks(parents: list[int], sizes: list[int], share: bool) -> Blocks:
    """Segments that are read together, parents first."""
    children = defaultdict(list)
    for s, parent in enumerate(parents):
        children[parent].append(s)
    blocks: Blocks = []

    def add_tree(s: int, parent: int, block: list[Stretch]) -> None:
        block.append(Stretch(s, 0, sizes[s], parent))
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
                block.append(Stretch(x, 0, sizes[x], i - 1))
            blocks.append(block)

    for root in children[-1]:
        if share:
            block: list[Stretch] = []
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
