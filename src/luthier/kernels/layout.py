"""How token segments lie in the rows of a tensor, and which of them may see which.

Every placed segment is a *piece*; a piece sees itself causally and the pieces it continues, and nothing
else, so no sequence ever sees another. A piece may stand for tokens of several sequences that begin alike.
model/layout.py makes layouts of batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """R rows of width W: R * W flat positions."""

    source: Tensor  # [R, W] index into batch.ids; 0 where there is padding or a soft prompt
    position: Tensor  # [R, W] distance from the start of the sequence, soft prompt included
    piece: Tensor  # [R, W] which placed segment, -1 for padding
    soft: Tensor  # [R, W] index of the soft prompt's vector, -1 elsewhere
    at: Tensor  # [L] flat position whose hidden state predicts a token, -1 where nothing precedes it
    place: Tensor  # [L] flat position of a token; of several where it is read several times
    sees: Tensor  # [P, P] bool: piece a continues, directly or not, piece b
    both: Tensor  # [P] bool: is this piece read from both sides? All others see what stands before
    saved: int = 0  # tokens of several rows that stand at one position, counted beyond the first
    host: Layout | None = field(default=None, compare=False, repr=False)  # the same, on the CPU

    def mask(self, window: int | None = None, chunk: int | None = None) -> Tensor:
        """[R, 1, W, W] bool, True = may look. window: sliding attention's reach; chunk: attention in chunks
        of positions.
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
    columns: dict[str, list[Tensor]] = defaultdict(list)
    tokens_before = positions_before = pieces_before = 0
    for layout, count in zip(layouts, tokens, strict=True):
        columns["source"].append(_shifted(layout.source, tokens_before))
        columns["position"].append(layout.position)
        columns["piece"].append(_shifted(layout.piece, pieces_before))
        columns["soft"].append(layout.soft)
        columns["at"].append(_shifted(layout.at, positions_before))
        columns["place"].append(_shifted(layout.place, positions_before))
        columns["both"].append(layout.both)
        tokens_before += count
        positions_before += layout.source.shape[1]
        pieces_before += len(layout.sees)
    tensors = {name: torch.cat(parts, -1) for name, parts in columns.items()}
    sees = torch.block_diag(*(layout.sees for layout in layouts)).bool()
    saved = sum(layout.saved for layout in layouts)
    hosts = [layout.host for layout in layouts if layout.host is not None]
    host = joined(hosts, tokens) if len(hosts) == len(layouts) else None
    return Layout(**tensors, sees=sees, saved=saved, host=host)


def _shifted(index: Tensor, by: int) -> Tensor:
    """Indices into what now stands `by` entries later; -1 stays."""
    return torch.where(index >= 0, index + by, index)
