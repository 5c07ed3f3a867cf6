"""Attention over packed sequences, block by block: each block of queries meets the keys it may see and no
others.

A mask over a packed row costs the square of its width, though nearly all of it says no. Here a tree of pieces
is cut into blocks; a block knows the positions of its queries and of their keys (its own pieces and those
they continue), and blocks of like size are computed together as batched matrix products, whose backward is 2
to 4 times faster on CPUs than that of the fused kernel. Any network of transformers that takes its attention
from the interface of that name gets it: `attention` is registered there and does what SDPA does, except
where the mask it is handed is a `tag` that carries a plan. `plain` is the twin that the tests compare with;
every run compares its log-probabilities with the network's own. Where the mask says that the network is
decoding, decode_attention.py answers. Keys and values that a tuner puts before those of every text
(`prefix_kv`) are met by all queries, whatever the mask; they are no positions of the layout, and no position
changes.

Positions here are flat: of [R, W] read as one row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.compat.transformers import add_entry, set_entry
from luthier.kernels._switch import differentiated_otherwise
from luthier.kernels.decode_attention import attend_one_token
from luthier.kernels.elementwise import dropout as random_dropout
from luthier.kernels.elementwise import dropout_mask
from luthier.kernels.layout import Layout

NAME = "luthier_sdpa"  # as transformers knows it
QUERIES = 256  # of a block at most: causal attention of long sequences skips what lies above the diagonal
WHOLE = 96  # tokens up to which a tree of pieces is one block, whatever part of its square is masked
EVEN = 32  # a CPU works on so many numbers at once; scores in rows of other lengths took it a third longer
SCORES = 2**22  # of a group at most, per head: what lives at once stays near the cache
# keys of a query up to which its probabilities are stored for backward; above they are computed again
KEEP = 512
UNSUPPORTED = ("s_aux", "position_bias", "softcap")  # arguments of attention that change the scores
PrefixKV = tuple[Tensor, Tensor]  # keys and values [K, m, d] before those of every text
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
    real_queries: Tensor | None  # [n, 1, 1, q, 1] 1 or 0; None: all are real
    to_queries: Tensor  # [n * q] where results go: their position, filled up ones behind the last
    to_keys: Tensor  # [n * k]
    ranges: tuple[Range, ...] | None  # None: no key is in an earlier block


@dataclass
class Plan:
    """How attention over `size` positions is computed."""

    size: int
    groups: list[Group]
    layout: Layout
    reach: tuple[int | None, int | None]  # window, chunk
    shared: bool  # is any key in several blocks? Then sums of its gradients are made in fp32
    padded: bool  # are there positions that are no token?
    used: bool = field(default=False)  # has the network used it?

    def tag(self) -> Tensor:
        """What a network is handed as its mask, and hands on to its attention."""
        tag: Any = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
        tag.plan = self
        return tag


# ------------------------------------------------------------ cutting


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
    """Cut a layout into blocks. window: how far a token looks back; chunk: attention stays within chunks of
    positions.
    """
    pieces = _Pieces(
        layout.piece.flatten().cpu(),
        layout.position.flatten().cpu(),
        layout.sees.cpu(),
        layout.both.cpu(),
        window,
        chunk,
    )
    size = len(pieces.piece)
    earlier = torch.zeros(size, dtype=torch.bool)  # keys of the groups so far
    side = max(QUERIES, WHOLE)
    straight = torch.full((side, side + EVEN), _lowest(dtype), dtype=dtype).triu_(1)
    groups = []
    for blocks in _alike(_blocks(pieces)):
        groups.append(_group(blocks, pieces, earlier, straight, layout.source.device))
    shared = any(group.ranges is not None for group in groups)
    return Plan(size, groups, layout, (window, chunk), shared, bool((pieces.piece < 0).any()))


def _group(
    blocks: list[Block], pieces: _Pieces, earlier: Tensor, straight: Tensor, device: torch.device
) -> Group:
    """Blocks filled up to one size. earlier: keys of the groups before, to which this one's are added.
    straight: the mask of a causal block, [q or more, k or more].
    """
    q = max(len(b.queries) for b in blocks)
    k = _even(max(len(b.keys) for b in blocks))
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
        mask = torch.zeros(may.shape, dtype=straight.dtype).masked_fill_(~may, _lowest(straight.dtype))
    real = None
    if not bool((queries >= 0).all()):
        real = (queries >= 0).to(straight.dtype)[:, None, None, :, None].to(device)
    last = len(pieces.piece)
    return Group(
        queries.clamp(min=0).to(device),
        keys.clamp(min=0).to(device),
        mask[:, None, None].to(device),
        real,
        torch.where(queries < 0, last, queries).flatten().to(device),
        torch.where(keys < 0, last, keys).flatten().to(device),
        tuple(ranges) if any(again for *_, again in ranges) else None,
    )


def _lowest(dtype: torch.dtype) -> float:
    """Added to a score, this leaves nothing of its probability, and does not overflow."""
    return torch.finfo(dtype).min / 2


def _even(n: int) -> int:
    """A length a little above n that is quicker, if there is one."""
    more = -(-n // EVEN) * EVEN
    return more if 8 * more <= 9 * n else n


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
        if len(whole) <= QUERIES and (len(whole) <= WHOLE or len(whole) ** 2 <= 1.3 * needed):
            if len(whole):
                yield Block(whole, whole, 0, causal and len(above[tree[-1]]) == len(tree))
            continue
        for run in _runs(tree, above):
            yield from _blocks_of_run(run, above[run[0]][:-1], positions, sizes, causal, pieces)


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
        first = int(pieces.position[queries[0]])
        before = len(above) + start
        if pieces.window:
            keys, before = keys[pieces.position[keys] > first - pieces.window], 0
        if pieces.chunk:
            keys, before = keys[pieces.position[keys] >= first // pieces.chunk * pieces.chunk], 0
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


# ------------------------------------------------------------ computing


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    how: Plan,
    scale: float,
    dropout: float = 0.0,
    prefix: PrefixKV | None = None,
) -> Tensor:
    """query [R, H, W, d], key and value [R, K, W, d], K a divisor of H -> [R, W, H, d]. Padding answers 0."""
    if differentiated_otherwise() or dropout >= 1:
        return _composed(query, key, value, how, scale, dropout, prefix)
    prefix_k, prefix_v = prefix or (None, None)
    return _Attend.apply(query, key, value, how, scale, prefix_k, prefix_v, dropout)


def plain(
    query: Tensor, key: Tensor, value: Tensor, how: Plan, scale: float, prefix: PrefixKV | None = None
) -> Tensor:
    """The same by a mask over whole rows."""
    may = how.layout.mask(*how.reach)
    if prefix is not None:
        key, value = _with_prefix(key, prefix[0]), _with_prefix(value, prefix[1])
        may = F.pad(may, (prefix[0].shape[1], 0), value=True)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~may, -torch.inf)
    real = (how.layout.piece >= 0)[:, :, None, None]
    return torch.where(real, (scores.softmax(-1) @ value).transpose(1, 2), 0.0)


def _with_prefix(x: Tensor, prefix: Tensor) -> Tensor:
    """[B, K, W, d] with [K, m, d] before it."""
    return torch.cat([prefix.expand(len(x), -1, -1, -1), x], 2)


def _flat(x: Tensor, heads: int) -> Tensor:
    """[R, H, W, d] -> [R * W, heads, H / heads, d]"""
    r, h, w, d = x.shape
    return x.transpose(1, 2).reshape(r * w, heads, h // heads, d)


def _take(x: Tensor, positions: Tensor) -> Tensor:
    """[T, K, g, d] and [n, L] -> [n * K, g * L, d]"""
    (n, length), (_, heads, g, d) = positions.shape, x.shape
    rows = x.flatten(1).index_select(0, positions.flatten()).view(n, length, heads, g, d)
    # else each product would copy it, for n = 1
    return rows.permute(0, 2, 3, 1, 4).reshape(n * heads, g * length, d).contiguous()


def _rows(x: Tensor, n: int, heads: int, g: int) -> Tensor:
    """[n * K, g * L, d] -> [n * L, K * g * d], the way back."""
    d = x.shape[-1]
    return x.view(n, heads, g, -1, d).permute(0, 3, 1, 2, 4).reshape(-1, heads * g * d)


def _probabilities(q: Tensor, k: Tensor, group: Group, heads: int, g: int, scale: float) -> Tensor:
    """[n * K, g * q, d], [n * K, k, d] -> [n * K, g * q, k]; those of a prefix, which come first, are seen by
    all.
    """
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    by_block = scores.view(-1, heads, g, *group.queries.shape[1:], k.shape[1])
    by_block[..., k.shape[1] - group.mask.shape[-1] :].add_(group.mask)
    return scores.softmax(-1)


def _after(prefix: Tensor | None, x: Tensor) -> Tensor:
    """[K, m, d] before each of [n * K, k, d]."""
    if prefix is None:
        return x
    return torch.cat([prefix.repeat(len(x) // len(prefix), 1, 1), x], 1)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        how: Plan,
        scale: float,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        dropout: float,
    ) -> Tensor:
        r, h, w, _ = query.shape
        heads, size = key.shape[1], value.shape[3]
        q, k, v = _flat(query, heads), _flat(key, heads), _flat(value, heads)
        g = h // heads
        out = _empty(how, h * size, dtype=value.dtype, device=value.device)
        differentiated = any(ctx.needs_input_grad)
        stored: list[Tensor | None] = []  # probabilities of each group, or None: computed again in backward
        masks: list[Tensor | None] = []  # which of them dropout leaves
        for group in how.groups:
            keys, values = _after(prefix_k, _take(k, group.keys)), _after(prefix_v, _take(v, group.keys))
            p = _probabilities(_take(q, group.queries), keys, group, heads, g, scale)
            mask = dropout_mask(p, dropout) if dropout else None
            mixed = torch.bmm(_masked(p, mask), values)
            out.index_copy_(0, group.to_queries, _rows(mixed, len(group.keys), heads, g))
            masks.append(mask)
            stored.append(p if differentiated and p.shape[-1] <= KEEP else None)
        ctx.save_for_backward(query, key, value, prefix_k, prefix_v, *stored, *masks)
        ctx.how, ctx.scale, ctx.dropout = how, scale, dropout
        if dropout:
            out.mul_(1 / (1 - dropout))
        return out[:-1].view(r, w, h, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: somebody will differentiate this gradient
            return _differentiable_grads(ctx, grads[0])
        query, key, value, prefix_k, prefix_v, *rest = ctx.saved_tensors
        how, scale, dropout = ctx.how, ctx.scale, ctx.dropout
        stored, masks = rest[: len(how.groups)], rest[len(how.groups) :]
        r, h, w, d = query.shape
        heads, size = key.shape[1], value.shape[3]
        g = h // heads
        q, k, v = _flat(query, heads), _flat(key, heads), _flat(value, heads)
        grad = grads[0]
        if dropout:
            grad = grad * (1 / (1 - dropout))
        grad = grad.reshape(r * w, heads, g, size)
        sums = torch.float32 if how.shared else key.dtype
        d_q = _empty(how, h * d, dtype=query.dtype, device=query.device)
        d_k = _empty(how, heads, d, dtype=sums, device=key.device)
        d_v = _empty(how, heads, size, dtype=sums, device=value.device)
        d_prefix_k = d_prefix_v = None
        if prefix_k is not None:
            d_prefix_k = torch.zeros_like(prefix_k, dtype=torch.float32)
            d_prefix_v = torch.zeros_like(prefix_v, dtype=torch.float32)
        for group, p, mask in zip(how.groups, stored, masks, strict=True):
            n = len(group.keys)
            qs, gs = _take(q, group.queries), _take(grad, group.queries)
            ks, vs = _after(prefix_k, _take(k, group.keys)), _after(prefix_v, _take(v, group.keys))
            if group.real_queries is not None:
                gs.view(n, heads, g, -1, size).mul_(group.real_queries)
            if p is None:
                p = _probabilities(qs, ks, group, heads, g, scale)
            _add(d_v, torch.bmm(_masked(p, mask).transpose(1, 2), gs), group, d_prefix_v)
            ds = _masked(torch.bmm(gs, vs.transpose(1, 2)), mask)
            ds = torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype)
            d_q.index_copy_(0, group.to_queries, _rows(torch.bmm(ds, ks).mul_(scale), n, heads, g))
            _add(d_k, torch.bmm(ds.transpose(1, 2), qs).mul_(scale), group, d_prefix_k)
        if prefix_k is not None and d_prefix_k is not None and d_prefix_v is not None:
            d_prefix_k, d_prefix_v = d_prefix_k.to(prefix_k.dtype), d_prefix_v.to(prefix_v.dtype)
        return (
            d_q[:-1].view(r, w, h, d).transpose(1, 2),
            d_k[:-1].to(key.dtype).view(r, w, heads, -1).transpose(1, 2),
            d_v[:-1].to(value.dtype).view(r, w, heads, -1).transpose(1, 2),
            None,
            None,
            d_prefix_k,
            d_prefix_v,
            None,
        )


def _empty(how: Plan, *shape: int, **options: Any) -> Tensor:
    """[T + 1, ...] that blocks write into; the last row is for what was filled up."""
    make = torch.zeros if how.padded else torch.empty
    return make(how.size + 1, *shape, **options)


def _differentiable_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of `_Attend`, by operations that torch differentiates."""
    query, key, value, prefix_k, prefix_v, *rest = ctx.saved_tensors
    masks = rest[len(ctx.how.groups) :]
    prefix = None if prefix_k is None else (prefix_k, prefix_v)
    out = _composed(query, key, value, ctx.how, ctx.scale, ctx.dropout, prefix, masks)
    inputs = (query, key, value, None, None, prefix_k, prefix_v, None)
    needed = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=True) if need and x is not None]
    grads = list(torch.autograd.grad(out, needed, grad, create_graph=True))
    return tuple(grads.pop(0) if need else None for need in ctx.needs_input_grad)


def _masked(p: Tensor, mask: Tensor | None) -> Tensor:
    return p if mask is None else p * mask


def _add(total: Tensor, part: Tensor, group: Group, prefix: Tensor | None = None) -> None:
    """total [T + 1, K, d] += part [n * K, k, d] at the positions of its keys; prefix [K, m, d] += what comes
    before these.
    """
    _, heads, d = total.shape
    part = part.view(len(group.keys), heads, -1, d)
    if prefix is not None:
        prefix += part[:, :, : prefix.shape[1]].sum(0)
        part = part[:, :, prefix.shape[1] :]
    if group.ranges is None:
        total.index_copy_(0, group.to_keys, part.transpose(1, 2).reshape(-1, heads, d).to(total.dtype))
        return
    for block, first, position, length, again in group.ranges:
        here = total[position : position + length]
        more = part[block, :, first : first + length].transpose(0, 1)
        if again:
            here.add_(more)
        else:
            here.copy_(more)


def _composed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    how: Plan,
    scale: float,
    dropout: float = 0.0,
    prefix: PrefixKV | None = None,
    masks: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The same of operations that torch differentiates by itself. masks: what dropout left, where that is
    known.
    """
    prefix_k, prefix_v = prefix or (None, None)
    r, h, w, _ = query.shape
    heads, size = key.shape[1], value.shape[3]
    q, k, v = _flat(query, heads), _flat(key, heads), _flat(value, heads)
    out = value.new_zeros(r * w + 1, h * size)
    for i, group in enumerate(how.groups):
        n, g = len(group.keys), h // heads
        scores = _take(q, group.queries) @ _after(prefix_k, _take(k, group.keys)).transpose(1, 2) * scale
        mask = F.pad(group.mask, (scores.shape[-1] - group.mask.shape[-1], 0))
        scores = (scores.view(n, heads, g, -1, mask.shape[-1]) + mask).view_as(scores)
        p = scores.softmax(-1)
        if dropout:
            left = masks[i] if masks else None
            p = random_dropout(p, dropout) if left is None else p * left * (1 / (1 - dropout))
        mixed = p @ _after(prefix_v, _take(v, group.keys))
        out = out.index_copy(0, group.to_queries, _rows(mixed, n, heads, g))
    return out[:-1].view(r, w, h, size)


# ------------------------------------------------------------ in transformers


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface. Without a plan on its mask it is SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    prefix = prefix_of(module, key, value)
    scale = options.get("scaling")
    decoding = getattr(attention_mask, "decoding", None)
    if decoding is not None:
        out = attend_one_token(query, key, value, decoding, scale, prefix)
        return out.transpose(1, 2), None
    how = getattr(attention_mask, "plan", None)
    if how is None:
        if prefix is not None:
            attention_mask = _mask_with_prefix(
                module, query, key, attention_mask, prefix, options.get("is_causal")
            )
            key, value = _with_prefix(key, prefix[0]), _with_prefix(value, prefix[1])
            options["is_causal"] = False
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise NotImplementedError(f"attention with {name} is not computed block by block")
    how.used = True
    if scale is None:
        scale = query.shape[-1] ** -0.5
    dropout = float(options.get("dropout") or 0.0)
    return attend(query, key, value, how, float(scale), dropout, prefix), None


def prefix_of(module: Any, key: Tensor, value: Tensor) -> PrefixKV | None:
    """What a part of an attention module puts before every text's keys and values."""
    for part in module.children():
        prefix = part.prefix_kv() if hasattr(part, "prefix_kv") else None
        if prefix is not None:
            return _by_head(prefix[0], key), _by_head(prefix[1], value)
    return None


def _by_head(prefix: Tensor, like: Tensor) -> Tensor:
    """[m, K * d] -> [K, m, d], in the precision of `like` [R, K, W, d]."""
    return prefix.to(like.dtype).view(len(prefix), like.shape[1], -1).transpose(0, 1)


def _mask_with_prefix(
    module: Any,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    prefix: PrefixKV,
    causal: bool | None,
) -> Tensor | None:
    """A mask [.., Q, k] for keys with a prefix before them, which every query sees."""
    q, k = query.shape[2], key.shape[2]
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if mask is None and q > 1 and causal:
        mask = torch.ones(q, k, dtype=torch.bool, device=query.device).tril(k - q)[None, None]
    if mask is None:
        return None
    return F.pad(mask, (prefix[0].shape[1], 0), value=True if mask.dtype == torch.bool else 0.0)


def takes_plans(model: Any) -> bool:
    """Can this network be handed a plan? Registers the attention with transformers, and with a network that
    uses SDPA.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    config = model.config.get_text_config()
    if config._attn_implementation == NAME:
        return True
    sources = {type(m).__module__ for m in model.modules()}
    chooses = any("ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[source]) for source in sources)
    if config._attn_implementation != "sdpa" or not chooses:
        return False
    add_entry(AttentionInterface._global_mapping, NAME, attention)
    add_entry(AttentionMaskInterface._global_mapping, NAME, sdpa_mask)
    config._attn_implementation = NAME
    return True


def exclude_from_compile(model: Any) -> None:
    """Where a network takes plans: torch.compile leaves its attention as it is."""
    if takes_plans(model):
        from transformers import AttentionInterface

        set_entry(AttentionInterface._global_mapping, NAME, torch.compiler.disable(attention))
