"""A tree of segments as rows of a tensor: packed without padding between them, each prompt read once if
shared.

Every placed segment is a *piece*; a piece sees itself causally and the pieces it continues, and nothing else,
so no sequence ever sees another. Loops run over segments, never over tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.model.batch import Batch


@dataclass(frozen=True)
class Layout:
    """R rows of W places."""

    source: Tensor  # [R, W] index into batch.ids; 0 where the place is padding or a soft prompt
    position: Tensor  # [R, W] distance from the start of the sequence, soft prompt included
    piece: Tensor  # [R, W] which placed segment, -1 for padding
    soft: Tensor  # [R, W] index of the soft prompt's vector, -1 elsewhere
    at: Tensor  # [L] flat place whose hidden state predicts a token, -1 where nothing precedes it
    sees: Tensor  # [P, P] bool: piece a continues, directly or not, piece b
    both: Tensor  # [P] bool: is this piece read from both sides? All others see what stands before

    def mask(self, window: int | None = None, chunk: int | None = None) -> Tensor:
        """[R, 1, W, W] bool, True = may look, by position. window: sliding attention's reach; chunk:
        attention in blocks.
        """
        order = torch.arange(self.piece.shape[1], device=self.piece.device)
        piece = self.piece.clamp(min=0)
        before = order[:, None] >= order
        if bool(self.both.any()):
            before = before | self.both[piece][:, :, None] & (piece[:, :, None] == piece[:, None, :])
        may = self.sees[piece[:, :, None], piece[:, None, :]] & before
        may &= (self.piece >= 0)[:, None, :]
        if window:
            may &= self.position[:, :, None] - self.position[:, None, :] < window
        if chunk:
            block = self.position // chunk
            may &= block[:, :, None] == block[:, None, :]
        may |= torch.eye(len(order), dtype=torch.bool, device=may.device)  # padding looks at itself: no NaN
        return may[:, None]


def joined(layouts: Sequence[Layout], tokens: Sequence[int]) -> Layout:
    """Layouts of one row each, of batches with so many tokens, as one row: behind each other, none sees
    another.
    """
    places, pieces = (
        [getattr(x, name).shape[i] for x in layouts] for name, i in (("source", 1), ("sees", 0))
    )
    before = [[sum(sizes[:k]) for k in range(len(layouts))] for sizes in (tokens, places, pieces)]

    def side_by_side(name: str, ahead: Sequence[int] | None, least: int = 0) -> Tensor:
        parts = [getattr(x, name) for x in layouts]
        return torch.cat(
            (
                parts
                if ahead is None
                else [torch.where(x >= least, x + n, x) for x, n in zip(parts, ahead, strict=True)]
            ),
            -1,
        )

    return Layout(
        source=side_by_side("source", before[0]),
        position=side_by_side("position", None),
        piece=side_by_side("piece", before[2]),
        soft=side_by_side("soft", None),
        at=side_by_side("at", before[1]),
        sees=torch.block_diag(*(x.sees for x in layouts)).bool(),
        both=side_by_side("both", None),
    )


def lay_out(
    batch: Batch, *, share: bool = True, width: int = 0, virtual: int = 0, prefix: bool = False
) -> Layout:
    """Pack the batch's tree into rows of at least `width` places; `virtual` places precede every root.

    share: read a prompt once for all its completions, else once for each. width 0: one sequence per row
    (padded). prefix: the segments that rows begin with, where others continue them, are read from both sides.
    """
    sizes, parents = batch.sizes, batch.parent.tolist()
    continued = {*parents}
    blocks = _blocks(parents, share)
    long = [sum((sizes[s] for s, _ in block), virtual) for block in blocks]
    rows = _pack(long, max(width, *long) if width else 0)
    wide = max(sum(long[b] for b in row) for row in rows)

    pieces: list[_Piece] = []
    for r, row in enumerate(rows):
        place = r * wide
        for b in row:
            root = None
            if virtual:
                root = _Piece(-1, len(pieces), place, 0, virtual, None)
                pieces.append(root)
                place += virtual
            mine: list[_Piece] = []
            for s, under in blocks[b]:
                above = mine[under] if under >= 0 else root
                mine.append(
                    _Piece(s, len(pieces) + len(mine), place, above.stop if above else 0, sizes[s], above)
                )
                place += sizes[s]
            pieces += mine

    size = torch.tensor([p.size for p in pieces])
    which = torch.repeat_interleave(torch.arange(len(pieces)), size)  # piece of each placed token
    inner = torch.arange(len(which)) - torch.repeat_interleave(size.cumsum(0) - size, size)
    segment, start, place, last = torch.tensor(
        [(p.segment, p.start, p.place, p.last_above) for p in pieces]
    ).unbind(1)
    flat = place[which] + inner
    first = torch.tensor([0, *sizes]).cumsum(0)  # first token of each segment in batch.ids
    real = segment[which] >= 0
    token = torch.where(real, first[segment[which]] + inner, 0)

    def table(values: Tensor, fill: int) -> Tensor:
        return torch.full((len(rows) * wide,), fill).index_copy_(0, flat, values).view(len(rows), wide)

    at = torch.full((len(batch.ids),), -1)
    at[token[real]] = torch.where(inner == 0, last[which], flat - 1)[real]
    sees = torch.eye(len(pieces), dtype=torch.bool)
    for p in pieces:
        if p.above is not None:
            sees[p.index] |= sees[p.above.index]
    made = Layout(
        source=table(token, 0),
        position=table(start[which] + inner, 0),
        piece=table(which, -1),
        soft=table(torch.where(real, -1, inner), -1),
        at=at,
        sees=sees,
        both=torch.tensor(
            [prefix and p.segment >= 0 and parents[p.segment] < 0 and p.segment in continued for p in pieces],
            dtype=torch.bool,
        ),
    )
    device = batch.ids.device
    return made if device.type == "cpu" else Layout(**{k: v.to(device) for k, v in vars(made).items()})


@dataclass(frozen=True)
class _Piece:
    """A placed segment."""

    segment: int  # -1: the soft prompt
    index: int
    place: int  # flat place of its first token
    start: int  # position of its first token
    size: int
    above: _Piece | None  # what it continues

    @property
    def stop(self) -> int:
        return self.start + self.size

    @property
    def last_above(self) -> int:
        """Flat place of the token before its first one, -1 where there is none. An empty piece passes the
        question on.
        """
        above = self.above
        while above is not None and not above.size:
            above = above.above
        return -1 if above is None else above.place + above.size - 1


def _blocks(parents: list[int], share: bool) -> list[list[tuple[int, int]]]:
    """Segments that are read together, parents first: (segment, place in the block of the segment it
    continues).
    """
    children = defaultdict(list)
    for s, under in enumerate(parents):
        children[under].append(s)

    def whole(s: int, under: int, block: list) -> list:
        block.append((s, under))
        mine = len(block) - 1
        for child in children[s]:
            whole(child, mine, block)
        return block

    def paths(s: int, above: list[int]) -> list[list[tuple[int, int]]]:
        chain = [*above, s]
        if not children[s]:
            return [[(x, k - 1) for k, x in enumerate(chain)]]
        return [path for child in children[s] for path in paths(child, chain)]

    return [block for root in children[-1] for block in ([whole(root, -1, [])] if share else paths(root, []))]


def _pack(sizes: list[int], width: int) -> list[list[int]]:
    """First fit, longest first; width 0 puts every block on its own row, in order."""
    if not width:
        return [[b] for b in range(len(sizes))]
    rows: list[list[int]] = []
    room: list[int] = []
    for b in sorted(range(len(sizes)), key=lambda b: -sizes[b]):
        r = next((r for r, free in enumerate(room) if free >= sizes[b]), None)
        if r is None:
            rows.append([b])
            room.append(width - sizes[b])
        else:
            rows[r].append(b)
            room[r] -= sizes[b]
    return rows
