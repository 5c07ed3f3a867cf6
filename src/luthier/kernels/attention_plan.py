"""How attention over packed sequences is cut into blocks: a layout becomes a plan, by which attention.py
computes.

A tree of pieces is cut into blocks; a block knows the positions of its queries and of the keys that they may
see (its own pieces and those they continue). Branches that continue the same long trunk meet its keys in one
block. Blocks of like size are put into one group, to be computed together. Positions are flat: of [R, W] read
as one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from luthier.kernels.flash import Calls, calls_of
from luthier.kernels.layout import Layout
from luthier.kernels.transfer import to_device

QUERIES = 256  # of a block at most: causal attention of long sequences skips what lies above the diagonal
WHOLE = 96  # tokens up to which a tree of pieces is one block, whatever part of its square is masked
WASTE = 1.3  # scores of a block of several branches, against those that are not masked
EVEN = 32  # a CPU works on so many numbers at once; scores in rows of other lengths took it a third longer
SCORES = 2**22  # of a group at most, per head: what lives at once stays near the cache
# (block, index of its first key, first position, length, seen before?) of an unbroken stretch of keys
Range = tuple[int, int, int, int, bool]


@dataclass(frozen=True)
class Group:
    """n blocks of q queries and k keys, shorter ones filled up."""

    queries: Tensor  # [n, q] positions
    keys: Tensor  # [n, k] positions
    # [n or 1, 1, 1, q, m] added to the scores of the last m keys: 0 or very negative; all queries see those
    # before
    mask: Tensor
    to_queries: Tensor  # [n * q] where results go: their position, filled up ones behind the last
    to_keys: Tensor  # [n * k]
    ranges: tuple[Range, ...] | None  # None: no key is in an earlier block
    real_queries: Tensor | None = None  # [n, 1, 1, q, 1] 1 or 0; None: all are real


@dataclass
class Plan:
    """How attention over `size` positions is computed: in blocks, or on a GPU by a few calls, whichever is
    asked for.
    """

    size: int
    layout: Layout
    reach: tuple[int | None, int | None]  # window, chunk
    padded: bool  # are there positions that are no token?
    dtype: torch.dtype
    used: bool = field(default=False)  # has the network used it?
    # told of every module that uses it, with its keys and values
    record: Callable[[Any, Tensor, Tensor], None] | None = None

    @cached_property
    def groups(self) -> list[Group]:
        """Blocks, those of like size together."""
        return _groups(self.layout, self.dtype, *self.reach)

    @cached_property
    def shared(self) -> bool:
        """Is any key in several blocks? Then sums of its gradients are made in fp32."""
        return any(group.ranges is not None for group in self.groups)

    @cached_property
    def calls(self) -> Calls | None:
        """Calls of torch's flash attention, where the layout is one for which there are some."""
        return calls_of(self.layout, *self.reach)

    def tag(self) -> Tensor:
        """What a network is handed as its mask, and hands on to its attention."""
        tag: Any = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
        tag.plan = self
        return tag


@dataclass(frozen=True)
class Block:
    """Positions of queries and keys; keys ascend, and those in the same piece keep their order."""

    queries: Tensor
    keys: Tensor
    before: int  # so many keys, the first ones, are seen by all queries
    straight: bool  # does query i see the keys up to the one at before + i, and no others?


@dataclass(frozen=True)
class _Pieces:
    """A layout on the CPU, and how far a token looks."""

    piece: Tensor  # [T] of each position
    position: Tensor  # [T] in the sequence
    sees: Tensor  # [P, P]
    both: Tensor  # [P]
    window: int | None
    chunk: int | None

    def allowed(self, a: Tensor, b: Tensor) -> Tensor:
        """[n, q, 1], [n, 1, k] positions (-1: filled up) -> [n, q, k] may a look at b?"""
        of_a, of_b = self.piece[a.clamp(min=0)], self.piece[b.clamp(min=0)]
        may = self.sees[of_a, of_b] & ((a >= b) | self.both[of_a] & (of_a == of_b)) & (b >= 0)
        if self.window:
            may &= self.position[a] - self.position[b] < self.window
        if self.chunk:
            may &= self.position[a] // self.chunk == self.position[b] // self.chunk
        return may | (a < 0)  # filled up queries look at anything: no NaN


def plan(layout: Layout, dtype: torch.dtype, window: int | None = None, chunk: int | None = None) -> Plan:
    """How attention over a layout is computed. window: how far a token looks back; chunk: attention stays
    within chunks of positions.
    """
    piece = (layout.host or layout).piece
    return Plan(piece.numel(), layout, (window, chunk), bool((piece < 0).any()), dtype)


def _groups(
    layout: Layout, dtype: torch.dtype, window: int | None = None, chunk: int | None = None
) -> list[Group]:
    """Cut a layout into blocks."""
    here = layout.host or layout
    pieces = _Pieces(
        here.piece.flatten().cpu(),
        here.position.flatten().cpu(),
        here.sees.cpu(),
        here.both.cpu(),
        window,
        chunk,
    )
    size = len(pieces.piece)
    earlier = torch.zeros(size, dtype=torch.bool)  # keys of the groups so far
    # added to a score, this leaves nothing of its probability, and does not overflow
    lowest = torch.finfo(dtype).min / 2
    side = max(QUERIES, WHOLE)
    straight = torch.full((side, side + EVEN), lowest, dtype=dtype).triu_(1)
    groups = []
    for blocks in _alike(_blocks(pieces)):
        groups.append(_group(blocks, pieces, earlier, straight, lowest, layout.source.device))
    return groups


def _group(
    blocks: list[Block],
    pieces: _Pieces,
    earlier: Tensor,
    straight: Tensor,
    lowest: float,
    device: torch.device,
) -> Group:
    """Blocks filled up to one size. earlier: keys of the groups before, to which this one's are added.
    straight: the mask of a causal block, [q or more, k or more]. lowest: what masks hold for a key that is
    not seen.
    """
    q = max(len(b.queries) for b in blocks)
    k = max(len(b.keys) for b in blocks)
    even = -(-k // EVEN) * EVEN
    if 8 * even <= 9 * k:  # quicker, though a little longer
        k = even
    queries, keys = torch.full((len(blocks), q), -1), torch.full((len(blocks), k), -1)
    ranges: list[Range] = []
    for i, block in enumerate(blocks):
        queries[i, : len(block.queries)] = block.queries
        keys[i, : len(block.keys)] = block.keys
        ranges += _ranges(i, block.keys, earlier)
        earlier[block.keys] = True
    before = min(block.before for block in blocks)
    if all(block.straight and block.before == before for block in blocks):
        mask = straight[:q, : k - before][None]
    else:
        may = pieces.allowed(queries[:, :, None], keys[:, None, before:])
        mask = torch.zeros(may.shape, dtype=straight.dtype).masked_fill_(~may, lowest)
    real = None
    if not bool((queries >= 0).all()):
        real = (queries >= 0).to(straight.dtype)[:, None, None, :, None]
    last = len(pieces.piece)
    continues = any(again for *_, again in ranges)
    tensors = {
        "queries": queries.clamp(min=0),
        "keys": keys.clamp(min=0),
        "mask": mask[:, None, None],
        "to_queries": torch.where(queries < 0, last, queries).flatten(),
        "to_keys": torch.where(keys < 0, last, keys).flatten(),
    }
    if real is not None:
        tensors["real_queries"] = real
    return Group(**to_device(tensors, device), ranges=tuple(ranges) if continues else None)


def _ranges(block: int, positions: Tensor, earlier: Tensor) -> Iterator[Range]:
    """Unbroken stretches of ascending positions that were all seen before, or all not."""
    again = earlier[positions]
    breaks = (positions[1:] - positions[:-1] != 1) | (again[1:] != again[:-1])
    ends = [*(breaks.nonzero().squeeze(1) + 1).tolist(), len(positions)]
    start = 0
    for end in ends:
        yield block, start, int(positions[start]), end - start, bool(again[start])
        start = end


def _blocks(pieces: _Pieces) -> Iterator[Block]:
    """Trees of pieces, each as one block where that is small or wastes little, else run by run."""
    piece, sees = pieces.piece, pieces.sees
    real = (piece >= 0).nonzero().squeeze(1)
    order = piece[real].argsort(stable=True)
    sizes = torch.bincount(piece[real], minlength=len(sees)).tolist()
    positions = real[order].split(sizes)  # of each piece
    # what a piece sees, itself last: parents come first
    above = [row.nonzero().squeeze(1).tolist() for row in sees]
    causal = not (pieces.window or pieces.chunk or bool(pieces.both.any()))
    trees: dict[int, list[int]] = {}  # root -> its pieces
    for p, line in enumerate(above):
        trees.setdefault(line[0], []).append(p)
    for tree in trees.values():
        whole = torch.cat([positions[p] for p in tree])
        needed = 0  # scores that are not masked, about
        for p in tree:
            needed += sizes[p] * sum(sizes[x] for x in above[p])
        if len(whole) <= QUERIES and (len(whole) <= WHOLE or len(whole) ** 2 <= WASTE * needed):
            if len(whole):
                yield Block(whole, whole, 0, causal and len(above[tree[-1]]) == len(tree))
            continue
        for bundle in _bundles(list(_runs(tree, above)), above, sizes):
            parents = above[bundle[0][0]][:-1]
            if len(bundle) == 1:
                yield from _blocks_of_run(bundle[0], parents, positions, sizes, causal, pieces)
            else:
                yield _block_of_runs(bundle, parents, positions, pieces)


def _bundles(runs: list[list[int]], above: list[list[int]], sizes: list[int]) -> Iterator[list[list[int]]]:
    """Runs that become blocks together: each by itself, or whole branches that continue the same pieces,
    where these are so long that it wastes little to compute what the branches must not see of each other.
    """
    last = {run[-1]: i for i, run in enumerate(runs)}  # run by its last piece
    children: dict[int, list[int]] = {}
    branch: list[list[int]] = [[i] for i in range(len(runs))]  # a run and all that continue it
    size, needed = [0] * len(runs), [0] * len(runs)  # tokens of a branch, and scores that are not masked
    for i in reversed(range(len(runs))):
        for p in runs[i]:
            size[i] += sizes[p]
            needed[i] += sizes[p] * sum(sizes[x] for x in above[p])
        line = above[runs[i][0]]
        parent = last[line[-2]] if len(line) > 1 else -1
        children.setdefault(parent, []).insert(0, i)
        for child in children.get(i, ()):
            size[i] += size[child]
            needed[i] += needed[child]
            branch[i] += branch[child]
    waiting = [children[-1]]  # branches with the same parent
    while waiting:
        bundle: list[int] = []
        tokens = scores = 0
        siblings = waiting.pop()
        before = sum(sizes[p] for p in above[runs[siblings[0]][0]][:-1])
        for i in siblings:
            if not _wastes_little(size[i], before, needed[i]):
                yield [runs[i]]
                if i in children:
                    waiting.append(children[i])
                continue
            if bundle and not _wastes_little(tokens + size[i], before, scores + needed[i]):
                yield [runs[k] for k in bundle]
                bundle, tokens, scores = [], 0, 0
            bundle += branch[i]
            tokens += size[i]
            scores += needed[i]
        if tokens:
            yield [runs[k] for k in bundle]


def _wastes_little(tokens: int, before: int, needed: int) -> bool:
    """May so many tokens, which continue `before` others, be a block of which so many scores are needed?"""
    return tokens <= QUERIES and tokens * (before + tokens) <= WASTE * needed


def _block_of_runs(
    runs: list[list[int]], parents: list[int], positions: Sequence[Tensor], pieces: _Pieces
) -> Block:
    """Branches in one block. parents: what all of them continue."""
    own = torch.cat([positions[p] for p in sorted(p for run in runs for p in run)])
    keys = torch.cat([*(positions[p] for p in parents), own])
    first = int(pieces.position[own].min())
    keys, before = _within_reach(keys, len(keys) - len(own), first, pieces)
    return Block(own, keys, before, False)


def _within_reach(keys: Tensor, before: int, first: int, pieces: _Pieces) -> tuple[Tensor, int]:
    """Of keys those that queries from position `first` of their sequence on may see, and how many all see."""
    if pieces.window:
        keys, before = keys[pieces.position[keys] > first - pieces.window], 0
    if pieces.chunk:
        keys, before = keys[pieces.position[keys] >= first // pieces.chunk * pieces.chunk], 0
    return keys, before


def _blocks_of_run(
    run: list[int],
    parents: list[int],
    positions: Sequence[Tensor],
    sizes: list[int],
    causal: bool,
    pieces: _Pieces,
) -> Iterator[Block]:
    """Blocks of about the same size. run: pieces one after the other; parents: what all of them continue."""
    own = torch.cat([positions[p] for p in run])
    if not len(own):
        return
    above = torch.cat([own[:0], *(positions[p] for p in parents)])
    parts = -(-len(own) // QUERIES)
    size = min(QUERIES, -(-len(own) // (parts * EVEN)) * EVEN)
    for start in range(0, len(own), size):
        stop = start + size
        keys_end, begun = stop, 0
        for p in run:  # of pieces read from both sides, all of what has begun
            if pieces.both[p] and begun <= stop - 1:
                keys_end = max(keys_end, begun + sizes[p])
            begun += sizes[p]
        queries, keys = own[start:stop], torch.cat([above, own[:keys_end]])
        keys, before = _within_reach(keys, len(above) + start, int(pieces.position[queries[0]]), pieces)
        yield Block(queries, keys, before, causal)


def _runs(tree: list[int], above: list[list[int]]) -> Iterator[list[int]]:
    """Pieces that follow each other without a branch are one run."""
    children: dict[int, list[int]] = {}
    for p in tree:
        if len(above[p]) > 1:
            children.setdefault(above[p][-2], []).append(p)
    for p in tree:
        if len(above[p]) > 1 and len(children[above[p][-2]]) == 1:
            continue
        run = [p]
        while len(children.get(run[-1], ())) == 1:
            run += children[run[-1]]
        yield run


def _alike(blocks: Iterator[Block]) -> Iterator[list[Block]]:
    """Blocks of about the same size, largest first."""
    group: list[Block] = []
    q = k = 0
    for block in sorted(blocks, key=lambda b: (-len(b.keys), -len(b.queries))):
        own_q, own_k = len(block.queries), len(block.keys)
        widest = max(q, own_q)
        near = widest - min(q, own_q) <= max(16, 0.12 * widest) and k - own_k <= max(16, 0.12 * k)
        if group and near and widest * k * (len(group) + 1) <= SCORES:
            group.append(block)
            q = widest
            continue
        if group:
            yield group
        group, q, k = [block], own_q, own_k
    if group:
        yield group
