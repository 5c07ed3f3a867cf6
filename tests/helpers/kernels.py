"""What a token of a packed layout may look at."""

from __future__ import annotations


def token_at(layout, r, w):
    """The token at a place, soft vectors as negative numbers."""
    return int(layout.source[r, w]) if layout.soft[r, w] < 0 else -1 - int(layout.soft[r, w])


def seen(batch, layout, window=None, chunk=None):
    """The sequence of (token, position) that each placed token may look at."""
    mask, out = layout.mask(window, chunk)[:, 0], {}
    for r, w in (layout.piece >= 0).nonzero().tolist():
        if layout.soft[r, w] >= 0:
            continue
        looked = mask[r, w].nonzero().squeeze(1).tolist()
        row = [(token_at(layout, r, x), int(layout.position[r, x])) for x in looked]
        out.setdefault(int(layout.source[r, w]), []).append(sorted(row, key=lambda x: x[1]))
    return out
