"""A tree of segments as rows of a tensor: packed without padding between them, each prompt read once if shared.

Every placed segment is a *piece*; a piece sees itself causally and the pieces it continues, and nothing else, so no
sequence ever sees another. Loops run over segments, never over tokens.
"""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.batch import Batch


@dataclass(frozen=True)
class Layout:
    """R rows of W places."""

    source: Tensor  # [R, W] index into batch.ids; 0 where the place is padding or a soft prompt
    position: Tensor  # [R, W] distance from the start of the sequence, soft prompt included
    piece: Tensor  # [R, W] which placed segment, -1 for padding
    soft: Tensor  # [R, W] index of the soft prompt's vector, -1 elsewhere
    at: Tensor  # [L] flat place whose hidden state predicts a token, -1 where nothing precedes it
    sees: Tensor  # [P, P] bool: piece a continues, directly or not, piece b

    def mask(self, window: int | None = None) -> Tensor:
        """[R, 1, W, W] bool, True = may look. `window`: sliding attention's reach in positions."""
        order = torch.arange(self.piece.shape[1], device=self.piece.device)
        piece = self.piece.clamp(min=0)
        may = self.sees[piece[:, :, None], piece[:, None, :]] & (order[:, None] >= order)
        may &= (self.piece >= 0)[:, None, :]
        if window:
            may &= self.position[:, :, None] - self.position[:, None, :] < window
        may |= torch.eye(len(order), dtype=torch.bool, device=may.device)  # padding looks at itself: no NaN
        return may[:, None]


def lay_out(batch: Batch, *, share: bool = True, width: int = 0, virtual: int = 0) -> Layout:
    """Pack the batch's tree into rows of at least `width` places; `virtual` places precede every root.

    share: read a prompt once for all its completions, else once for each. width 0: one sequence per row (padded).
    """
    sizes, parents = batch.sizes, batch.parent.tolist()
    blocks = _blocks(parents, share)
    long = [virtual + sum(sizes[s] for s, _ in block) for block in blocks]
    rows = _pack(long, max(width, max(long)) if width else 0)
    wide = max(sum(long[b] for b in row) for row in rows)

    # one entry per placed segment: its segment (-1: soft prompt), row, column, position, and piece it continues
    segment, row_of, column, position, up, length = [], [], [], [], [], []
    ends: list[int] = []  # column of each piece's last token
    for r, row in enumerate(rows):
        col = 0
        for b in row:
            first, stop = len(up), {}
            if virtual:
                _place(segment, row_of, column, position, up, length, -1, r, col, 0, -1, virtual)
                col += virtual
                ends.append(col - 1)
            base = len(up)
            for k, (s, under) in enumerate(blocks[b]):
                start = virtual if under < 0 else stop[under]
                above = (first if virtual else -1) if under < 0 else base + under
                _place(segment, row_of, column, position, up, length, s, r, col, start, above, sizes[s])
                col += sizes[s]
                stop[k] = start + sizes[s]
                ends.append(col - 1)

    device = batch.ids.device
    pieces = len(up)
    size = torch.tensor(length)
    which = torch.repeat_interleave(torch.arange(pieces), size)  # piece of each placed token
    inner = torch.arange(int(size.sum())) - torch.repeat_interleave(size.cumsum(0) - size, size)
    segment, row_of, column, position, above, ends = map(torch.tensor, (segment, row_of, column, position, up, ends))
    flat = row_of[which] * wide + column[which] + inner
    starts = torch.tensor([0, *sizes]).cumsum(0)  # first token of each segment in batch.ids
    token = torch.where(segment[which] >= 0, starts[segment[which].clamp(min=0)] + inner, -1)

    def table(values: Tensor, fill: int) -> Tensor:
        return torch.full((len(rows) * wide,), fill).index_copy_(0, flat, values).view(len(rows), wide)

    before = flat - 1
    opening = inner == 0
    from_above = torch.where(above >= 0, row_of * wide + ends[above.clamp(min=0)], -1)
    before[opening] = from_above[which[opening]]
    at = torch.full((len(batch.ids),), -1)
    real = token >= 0
    at[token[real]] = before[real]

    sees = torch.eye(pieces, dtype=torch.bool)
    for a, b in enumerate(up):
        if b >= 0:
            sees[a] |= sees[b]
    made = Layout(
        source=table(token.clamp(min=0), 0),
        position=table(position[which] + inner, 0),
        piece=table(which, -1),
        soft=table(torch.where(real, -1, inner), -1),
        at=at,
        sees=sees,
    )
    return Layout(**{k: v.to(device) for k, v in vars(made).items()}) if device.type != "cpu" else made


def _place(segment, row_of, column, position, up, length, s, r, col, start, above, size):
    segment.append(s)
    row_of.append(r)
    column.append(col)
    position.append(start)
    up.append(above)
    length.append(size)


def _blocks(parents: list[int], share: bool) -> list[list[tuple[int, int]]]:
    """Segments that are read together, parents first: (segment, place in the block of the segment it continues)."""
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
