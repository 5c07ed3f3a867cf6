"""Attention over packed sequences, block by block: each block of queries meets the keys it may see and no
others.

A mask over a packed row costs the square of its width, though nearly all of it says no. Here a tree of pieces
is cut into blocks; a block knows the places of its queries and of their keys (its own pieces and those they
continue), and blocks of like size are computed together as batched matrix products, whose backward is 2 to 4
times faster on CPUs than that of the fused kernel. Any network of transformers that takes its attention from
the interface of that name gets it: `attention` is registered there and does what SDPA does, except where the
mask it is handed is a `tag` that carries a plan. `plain` is the twin that the tests compare with; every run
compares its log-probabilities with the network's own. Where the mask says that the network is writing,
kernels/writing.py answers. Keys and values that a tuner puts before those of every text (`ahead`) are met by
all queries, whatever the mask; they are no places of the layout, and no position changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.compat.transformers import add_entry
from luthier.kernels import differentiated_otherwise
from luthier.kernels.decode_attention import one_token
from luthier.kernels.elementwise import dropout as leave_out
from luthier.kernels.elementwise import stays
from luthier.kernels.layout import Layout

NAME = "luthier_sdpa"  # as transformers knows it
QUERIES = 256  # of a block at most: causal attention of long sequences skips what lies above the diagonal
WHOLE = 96  # tokens up to which a tree of pieces is one block, whatever part of its square is masked
EVEN = 32  # a CPU works on so many numbers at once; scores in rows of other lengths took it a third longer
SCORES = 2**22  # of a group at most, per head: what lives at once stays near the cache
Ahead = tuple[Tensor, Tensor]  # keys and values [K, m, d] before those of every text
# keys of a query up to which its probabilities are kept for backward; above they are computed again
KEEP = 512


@dataclass(frozen=True)
class Group:
    """n blocks of q queries and k keys, shorter ones filled up."""

    queries: Tensor  # [n, q] flat places
    keys: Tensor  # [n, k] flat places
    # [n or 1, 1, 1, q, m] added to the scores of the last m keys: 0 or very negative; all queries see those
    # before
    mask: Tensor
    real_queries: Tensor | None  # [n, 1, 1, q, 1] 1 or 0; None: all are real
    to_queries: Tensor  # [n * q] where results go: their place, filled up ones behind the last place
    to_keys: Tensor  # [n * k]
    # (block, first key, first place, length, met before?); None: none is
    ranges: tuple[tuple[int, int, int, int, bool], ...] | None


@dataclass
class Plan:
    """How attention over `places` flat places is computed."""

    places: int
    groups: list[Group]
    layout: Layout
    reach: tuple[int | None, int | None]  # window, chunk
    shared: bool  # is any key met in several blocks? Then sums of its gradients are made in fp32
    padded: bool  # are there places that nobody asks about?
    used: bool = field(default=False)  # has the network asked for it?

    def tag(self) -> Tensor:
        """What a network is handed as its mask, and hands on to its attention."""
        made: Any = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
        made.plan = self
        return made


# ---------------------------------------------------------------------------------------------- cutting


@dataclass(frozen=True)
class Block:
    """Places of queries and keys; keys ascend, and those in the same piece keep their order."""

    queries: Tensor
    keys: Tensor
    before: int  # so many keys, the first ones, are seen by all queries
    straight: bool  # does query i see the keys up to the one at before + i, and no others?


def plan(layout: Layout, dtype: torch.dtype, window: int | None = None, chunk: int | None = None) -> Plan:
    """Cut a layout into blocks. window: how far a token looks back; chunk: attention stays within chunks of
    positions.
    """
    position, piece = layout.position.flatten().cpu(), layout.piece.flatten().cpu()
    sees, both = layout.sees.cpu(), layout.both.cpu()
    device, places = layout.source.device, len(piece)
    groups, met = [], torch.zeros(places, dtype=torch.bool)
    lowest, shared = torch.finfo(dtype).min / 2, False
    side = max(QUERIES, WHOLE)
    straight = torch.full((side, side + EVEN), lowest, dtype=dtype).triu_(1)
    for some in _alike(_blocks(piece, position, sees, both, window, chunk)):
        n, q, k = len(some), max(len(b.queries) for b in some), _even(max(len(b.keys) for b in some))
        queries, keys, ranges = torch.full((n, q), -1), torch.full((n, k), -1), []
        for i, block in enumerate(some):
            queries[i, : len(block.queries)] = block.queries
            keys[i, : len(block.keys)] = block.keys
            ranges += _ranges(i, block.keys, met)
            met[block.keys] = True
        before = min(block.before for block in some)
        if all(block.straight and block.before == before for block in some):
            mask = straight[:q, : k - before][None]
        else:
            a, b = queries[:, :, None], keys[:, None, before:]
            of_a, of_b = piece[a.clamp(min=0)], piece[b.clamp(min=0)]
            may = sees[of_a, of_b] & ((a >= b) | both[of_a] & (of_a == of_b)) & (b >= 0)
            if window:
                may &= position[a] - position[b] < window
            if chunk:
                may &= position[a] // chunk == position[b] // chunk
            may |= a < 0  # filled up queries look at anything: no NaN
            mask = torch.zeros(may.shape, dtype=dtype).masked_fill_(~may, lowest)
        real = (
            None
            if bool((queries >= 0).all())
            else (queries >= 0).to(dtype)[:, None, None, :, None].to(device)
        )
        to_queries, to_keys = (torch.where(x < 0, places, x).flatten().to(device) for x in (queries, keys))
        again = any(r[-1] for r in ranges)
        shared |= again
        read = queries.clamp(min=0).to(device), keys.clamp(min=0).to(device)
        groups.append(
            Group(
                *read,
                mask[:, None, None].to(device),
                real,
                to_queries,
                to_keys,
                tuple(ranges) if again else None,
            )
        )
    return Plan(places, groups, layout, (window, chunk), shared, bool((piece < 0).any()))


def _even(n: int) -> int:
    """A length a little above n that is quicker, if there is one."""
    more = -(-n // EVEN) * EVEN
    return more if 8 * more <= 9 * n else n


def _ranges(block: int, places: Tensor, met: Tensor) -> Iterator[tuple[int, int, int, int, bool]]:
    """Ascending places as (block, index of the first, first place, length, met before?) of each unbroken
    stretch.
    """
    known = met[places]
    ends = [
        *(((places[1:] - places[:-1] != 1) | (known[1:] != known[:-1])).nonzero().squeeze(1) + 1).tolist(),
        len(places),
    ]
    for a, b in zip([0, *ends], ends, strict=False):
        yield block, a, int(places[a]), b - a, bool(known[a])


def _blocks(
    piece: Tensor, position: Tensor, sees: Tensor, both: Tensor, window: int | None, chunk: int | None
) -> Iterator[Block]:
    real = (piece >= 0).nonzero().squeeze(1)
    order = piece[real].argsort(stable=True)
    sizes = torch.bincount(piece[real], minlength=len(sees)).tolist()
    places = real[order].split(sizes)  # of each piece
    # what a piece sees, itself last: parents come first
    above = [row.nonzero().squeeze(1).tolist() for row in sees]
    causal = not (window or chunk or bool(both.any()))
    roots: dict[int, list[int]] = {}
    for p, line in enumerate(above):
        roots.setdefault(line[0], []).append(p)
    for tree in roots.values():
        whole = torch.cat([places[p] for p in tree])
        least = sum(sizes[p] * sum(sizes[x] for x in above[p]) for p in tree)
        if len(whole) <= QUERIES and (len(whole) <= WHOLE or len(whole) ** 2 <= 1.3 * least):
            if len(whole):
                yield Block(whole, whole, 0, causal and len(above[tree[-1]]) == len(tree))
            continue
        for run in _runs(tree, above):
            own = torch.cat([places[p] for p in run])
            if not len(own):
                continue
            seen = torch.cat([own[:0], *(places[p] for p in above[run[0]][:-1])])
            # where each piece of the run begins in it
            begun = [(p, sum(sizes[x] for x in run[:i])) for i, p in enumerate(run)]
            parts = -(-len(own) // QUERIES)  # of about the same size
            most = min(QUERIES, -(-len(own) // (parts * EVEN)) * EVEN)
            for part in range(0, len(own), most):
                queries = own[part : part + most]
                ahead = max(
                    (start + sizes[p] for p, start in begun if both[p] and start <= part + most - 1),
                    default=0,
                )
                keys = torch.cat([seen, own[: max(part + most, ahead)]])
                first = int(position[queries[0]])
                if window:
                    keys = keys[position[keys] > first - window]
                if chunk:
                    keys = keys[position[keys] >= first // chunk * chunk]
                yield Block(queries, keys, 0 if window or chunk else len(seen) + part, causal)


def _runs(tree: list[int], above: list[list[int]]) -> Iterator[list[int]]:
    """Pieces that follow each other without a branch are one run."""
    under: dict[int, list[int]] = {}
    for p in tree:
        if len(above[p]) > 1:
            under.setdefault(above[p][-2], []).append(p)
    for p in tree:
        if len(above[p]) > 1 and len(under[above[p][-2]]) == 1:
            continue
        run = [p]
        while len(under.get(run[-1], ())) == 1:
            run += under[run[-1]]
        yield run


def _alike(blocks: Iterator[Block]) -> Iterator[list[Block]]:
    """Blocks of about the same size, largest first."""
    some: list[Block] = []
    q = k = 0
    for block in sorted(blocks, key=lambda b: (-len(b.keys), -len(b.queries))):
        mine = len(block.queries), len(block.keys)
        near = all(
            big - small <= max(16, 0.12 * big)
            for big, small in ((max(q, mine[0]), min(q, mine[0])), (k, mine[1]))
        )
        if some and near and max(q, mine[0]) * k * (len(some) + 1) <= SCORES:
            some.append(block)
            q = max(q, mine[0])
            continue
        if some:
            yield some
        some, (q, k) = [block], mine
    if some:
        yield some


# ---------------------------------------------------------------------------------------------- computing


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    how: Plan,
    scale: float,
    dropout: float = 0.0,
    ahead: Ahead | None = None,
) -> Tensor:
    """query [R, H, W, d], key and value [R, K, W, d], K a divisor of H -> [R, W, H, d]. Padding answers 0."""
    if differentiated_otherwise() or dropout >= 1:
        return _composed(query, key, value, how, scale, dropout, ahead)
    return _Attend.apply(query, key, value, how, scale, *(ahead or (None, None)), dropout)


def plain(
    query: Tensor, key: Tensor, value: Tensor, how: Plan, scale: float, ahead: Ahead | None = None
) -> Tensor:
    """The same by a mask over whole rows."""
    may = how.layout.mask(*how.reach)
    if ahead is not None:
        key, value = (
            torch.cat([a.expand(len(x), -1, -1, -1), x], 2) for a, x in zip(ahead, (key, value), strict=True)
        )
        may = F.pad(may, (ahead[0].shape[1], 0), value=True)
    more = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(more, 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~may, -torch.inf)
    real = (how.layout.piece >= 0)[:, :, None, None]
    return torch.where(real, (scores.softmax(-1) @ value).transpose(1, 2), 0.0)


def _flat(x: Tensor, heads: int) -> Tensor:
    """[R, H, W, d] -> [R * W, heads, H / heads, d]"""
    r, h, w, d = x.shape
    return x.transpose(1, 2).reshape(r * w, heads, h // heads, d)


def _take(x: Tensor, places: Tensor) -> Tensor:
    """[T, K, g, d] and [n, L] -> [n * K, g * L, d]"""
    (n, length), (_, heads, g, d) = places.shape, x.shape
    rows = x.flatten(1).index_select(0, places.flatten()).view(n, length, heads, g, d)
    # else each product would copy it, for n = 1
    return rows.permute(0, 2, 3, 1, 4).reshape(n * heads, g * length, d).contiguous()


def _rows(x: Tensor, n: int, heads: int, g: int) -> Tensor:
    """[n * K, g * L, d] -> [n * L, K * g * d], the way back."""
    d = x.shape[-1]
    return x.view(n, heads, g, -1, d).permute(0, 3, 1, 2, 4).reshape(-1, heads * g * d)


def _probabilities(q: Tensor, k: Tensor, group: Group, heads: int, g: int, scale: float) -> Tensor:
    """[n * K, g * q, d], [n * K, k, d] -> [n * K, g * q, k]; of the keys those that stand ahead are seen by
    all.
    """
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    scores.view(-1, heads, g, *group.queries.shape[1:], k.shape[1])[
        ..., k.shape[1] - group.mask.shape[-1] :
    ].add_(group.mask)
    return scores.softmax(-1)


def _after(ahead: Tensor | None, x: Tensor) -> Tensor:
    """[K, m, d] before each of [n * K, k, d]."""
    return x if ahead is None else torch.cat([ahead.repeat(len(x) // len(ahead), 1, 1), x], 1)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        how: Plan,
        scale: float,
        ahead_k: Tensor | None,
        ahead_v: Tensor | None,
        dropout: float,
    ) -> Tensor:
        r, h, w, _ = query.shape
        heads, size = key.shape[1], value.shape[3]
        q, k, v = _flat(query, heads), _flat(key, heads), _flat(value, heads)
        g = h // heads
        make = torch.zeros if how.padded else torch.empty
        out = make(r * w + 1, h * size, dtype=value.dtype, device=value.device)
        kept, stay = [], []  # probabilities, and which of them are not left out
        for group in how.groups:
            p = _probabilities(
                _take(q, group.queries), _after(ahead_k, _take(k, group.keys)), group, heads, g, scale
            )
            stay.append(stays(p, dropout) if dropout else None)
            mixed = torch.bmm(_some(p, stay[-1]), _after(ahead_v, _take(v, group.keys)))
            out.index_copy_(0, group.to_queries, _rows(mixed, len(group.keys), heads, g))
            kept.append(p if p.shape[-1] <= KEEP and any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(query, key, value, ahead_k, ahead_v, *kept, *stay)
        ctx.how, ctx.scale, ctx.dropout = how, scale, dropout
        return (out.mul_(1 / (1 - dropout)) if dropout else out)[:-1].view(r, w, h, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, ahead_k, ahead_v, *rest = ctx.saved_tensors
        how, scale, dropout = ctx.how, ctx.scale, ctx.dropout
        kept, stay = rest[: len(how.groups)], rest[len(how.groups) :]
        ahead = None if ahead_k is None else (ahead_k, ahead_v)
        if torch.is_grad_enabled():  # create_graph: somebody will differentiate this gradient
            given = (query, key, value, None, None, ahead_k, ahead_v, None)
            wanted = [x for x, w in zip(given, ctx.needs_input_grad, strict=True) if w and x is not None]
            out = _composed(query, key, value, how, scale, dropout, ahead, stay)
            found = iter(torch.autograd.grad(out, wanted, grads[0], create_graph=True))
            return tuple(next(found) if w else None for w in ctx.needs_input_grad)
        r, h, w, d = query.shape
        heads, size = key.shape[1], value.shape[3]
        g = h // heads
        q, k, v = _flat(query, heads), _flat(key, heads), _flat(value, heads)
        grad = (grads[0] * (1 / (1 - dropout)) if dropout else grads[0]).reshape(r * w, heads, g, size)
        make = torch.zeros if how.padded else torch.empty
        d_q = make(r * w + 1, h * d, dtype=query.dtype, device=query.device)
        sums = torch.float32 if how.shared else key.dtype
        d_k, d_v = (make(r * w + 1, heads, x.shape[3], dtype=sums, device=x.device) for x in (key, value))
        more_k, more_v = (
            None if x is None else torch.zeros_like(x, dtype=torch.float32) for x in (ahead_k, ahead_v)
        )
        for group, p, some in zip(how.groups, kept, stay, strict=True):
            n = len(group.keys)
            qs, gs = _take(q, group.queries), _take(grad, group.queries)
            ks, vs = _after(ahead_k, _take(k, group.keys)), _after(ahead_v, _take(v, group.keys))
            if group.real_queries is not None:
                gs.view(n, heads, g, -1, size).mul_(group.real_queries)
            p = _probabilities(qs, ks, group, heads, g, scale) if p is None else p
            _add(d_v, torch.bmm(_some(p, some).transpose(1, 2), gs), group, more_v)
            ds = _some(torch.bmm(gs, vs.transpose(1, 2)), some)
            ds = torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype)
            d_q.index_copy_(0, group.to_queries, _rows(torch.bmm(ds, ks).mul_(scale), n, heads, g))
            _add(d_k, torch.bmm(ds.transpose(1, 2), qs).mul_(scale), group, more_k)

        def back(x: Tensor, like: Tensor) -> Tensor:
            return x[:-1].to(like.dtype).view(r, w, heads, -1).transpose(1, 2)

        both = (None if x is None else x.to(a.dtype) for x, a in ((more_k, ahead_k), (more_v, ahead_v)))
        return (
            d_q[:-1].view(r, w, h, d).transpose(1, 2),
            back(d_k, key),
            back(d_v, value),
            None,
            None,
            *both,
            None,
        )


def _some(p: Tensor, stay: Tensor | None) -> Tensor:
    return p if stay is None else p * stay


def _add(total: Tensor, part: Tensor, group: Group, ahead: Tensor | None = None) -> None:
    """total [T + 1, K, d] += part [n * K, k, d] at the places of its keys; ahead [K, m, d] += what comes
    before these.
    """
    _, heads, d = total.shape
    part = part.view(len(group.keys), heads, -1, d)
    if ahead is not None:
        ahead += part[:, :, : ahead.shape[1]].sum(0)
        part = part[:, :, ahead.shape[1] :]
    if group.ranges is None:
        total.index_copy_(0, group.to_keys, part.transpose(1, 2).reshape(-1, heads, d).to(total.dtype))
        return
    for block, first, place, length, met in group.ranges:
        here, more = total[place : place + length], part[block, :, first : first + length].transpose(0, 1)
        here.add_(more) if met else here.copy_(more)


def _composed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    how: Plan,
    scale: float,
    dropout: float = 0.0,
    ahead: Ahead | None = None,
    stay: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The same of operations that torch differentiates by itself. stay: what dropout left, where that is
    known.
    """
    ahead_k, ahead_v = ahead or (None, None)
    r, h, w, _ = query.shape
    heads, size = key.shape[1], value.shape[3]
    q, k, v = _flat(query, heads), _flat(key, heads), _flat(value, heads)
    out = value.new_zeros(r * w + 1, h * size)
    for group, some in zip(how.groups, stay or [None] * len(how.groups), strict=True):
        n, g = len(group.keys), h // heads
        scores = _take(q, group.queries) @ _after(ahead_k, _take(k, group.keys)).transpose(1, 2) * scale
        mask = F.pad(group.mask, (scores.shape[-1] - group.mask.shape[-1], 0))
        scores = (scores.view(n, heads, g, -1, mask.shape[-1]) + mask).view_as(scores)
        p = scores.softmax(-1)
        if dropout:
            p = leave_out(p, dropout) if some is None else p * some * (1 / (1 - dropout))
        out = out.index_copy(
            0, group.to_queries, _rows(p @ _after(ahead_v, _take(v, group.keys)), n, heads, g)
        )
    return out[:-1].view(r, w, h, size)


# ---------------------------------------------------------------------------------------------- as transformers asks for it


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface. Without a plan on its mask it is SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found, written = getattr(attention_mask, "plan", None), getattr(attention_mask, "written", None)
    ahead = ahead_of(module, key, value)
    if written is not None:
        return one_token(query, key, value, written, how.get("scaling"), ahead).transpose(1, 2), None
    if found is None:
        if ahead is not None:
            key, value, attention_mask = behind(
                module, query, key, value, attention_mask, ahead, how.get("is_causal")
            )
            how["is_causal"] = False
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    odd = [name for name in ("s_aux", "position_bias", "softcap") if how.get(name) is not None]
    if odd:
        raise NotImplementedError(f"attention with {odd[0]} is not computed block by block")
    found.used = True
    scale = how.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return attend(query, key, value, found, scale, float(how.get("dropout") or 0.0), ahead), None


def ahead_of(module: Any, key: Tensor, value: Tensor) -> Ahead | None:
    """What a part of an attention module puts before every text's keys and values."""
    for part in module.children():
        said = part.ahead() if hasattr(part, "ahead") else None
        if said is not None:
            k, v = (
                x.to(own.dtype).view(len(x), own.shape[1], -1).transpose(0, 1)
                for x, own in zip(said, (key, value), strict=True)
            )
            return k, v
    return None


def behind(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    ahead: Ahead,
    causal: bool | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask [.., Q, k] with what stands ahead of them, which every query sees."""
    q, k = query.shape[2], key.shape[2]
    if mask is None and q > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
        mask = torch.ones(q, k, dtype=torch.bool, device=query.device).tril(k - q)[None, None]
    key, value = (
        torch.cat([a.expand(len(x), -1, -1, -1), x], 2) for a, x in zip(ahead, (key, value), strict=True)
    )
    return (
        key,
        value,
        (
            None
            if mask is None
            else F.pad(mask, (ahead[0].shape[1], 0), value=True if mask.dtype == torch.bool else 0.0)
        ),
    )


def takes_plans(model: Any) -> bool:
    """Can this network be handed a plan? Registers the attention with transformers, and with a network that
    uses SDPA.
    """
    import sys

    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    config = model.config.get_text_config()
    if config._attn_implementation == NAME:
        return True
    kinds = {type(m) for m in model.modules()}
    asks = any("ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[kind.__module__]) for kind in kinds)
    if config._attn_implementation != "sdpa" or not asks:
        return False
    add_entry(AttentionInterface._global_mapping, NAME, attention)
    add_entry(AttentionMaskInterface._global_mapping, NAME, sdpa_mask)
    config._attn_implementation = NAME
    return True
