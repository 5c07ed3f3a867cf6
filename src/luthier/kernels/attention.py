"""Attention over packed sequences, block by block: each block of queries meets the keys it may see and no
others.

A mask over a packed row costs the square of its width, though nearly all of it says no. Here the blocks of a
plan (attention_plan.py) are computed as batched matrix products, whose backward is 2 to 4 times faster on
CPUs than that of the fused kernel. Any network of transformers that takes its attention from the interface of
that name gets it: `attention` is registered there and does what SDPA does, except where the mask it is handed
is a `tag` that carries a plan. `plain` is the twin that the tests compare with; every run compares its
log-probabilities with the network's own. Where the mask says that the network is decoding,
decode_attention.py answers. Keys and values that a tuner puts before those of every text (`prefix_kv`) are
met by all queries, whatever the mask; they are no positions of the layout, and no position changes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.compat.transformers import add_entry
from luthier.kernels import flash
from luthier.kernels._switch import differentiated_otherwise
from luthier.kernels.attention_plan import Group, Plan
from luthier.kernels.elementwise import dropout as random_dropout
from luthier.kernels.elementwise import dropout_mask

NAME = "luthier_sdpa"  # as transformers knows it
# keys of a query up to which its probabilities are stored for backward; above they are computed again
KEEP = 512
UNSUPPORTED = ("s_aux", "position_bias", "softcap")  # arguments of attention that change the scores
PrefixKV = tuple[Tensor, Tensor]  # keys and values [K, m, d] before those of every text


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
    if not dropout and flash.suits(query, key, value) and how.calls is not None:
        twin = partial(_twin, how, scale)
        return flash.attend(query, key, value, how.calls, scale, prefix_k, prefix_v, twin)
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
        empty = torch.zeros if how.padded else torch.empty
        # the last row is for what was filled up
        out = empty(how.size + 1, h * size, dtype=value.dtype, device=value.device)
        differentiated = any(ctx.needs_input_grad)
        stored: list[Tensor | None] = []  # probabilities of each group, or None: computed again in backward
        masks: list[Tensor | None] = []  # which of them dropout leaves
        for group in how.groups:
            keys, values = _after(prefix_k, _take(k, group.keys)), _after(prefix_v, _take(v, group.keys))
            p = _probabilities(_take(q, group.queries), keys, group, heads, g, scale)
            weights, mask = p, None
            if dropout:
                mask = dropout_mask(p, dropout)
                weights = p * mask
            mixed = torch.bmm(weights, values)
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
        empty = torch.zeros if how.padded else torch.empty
        # the last row of each is for what was filled up
        d_q = empty(how.size + 1, h * d, dtype=query.dtype, device=query.device)
        d_k = empty(how.size + 1, heads, d, dtype=sums, device=key.device)
        d_v = empty(how.size + 1, heads, size, dtype=sums, device=value.device)
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
            weights = p if mask is None else p * mask
            _add(d_v, torch.bmm(weights.transpose(1, 2), gs), group, d_prefix_v)
            ds = torch.bmm(gs, vs.transpose(1, 2))
            if mask is not None:
                ds = ds * mask
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


def _differentiable_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of `_Attend`, by operations that torch differentiates."""
    query, key, value, prefix_k, prefix_v, *rest = ctx.saved_tensors
    masks = rest[len(ctx.how.groups) :]
    prefix = None if prefix_k is None else (prefix_k, prefix_v)
    out = _composed(query, key, value, ctx.how, ctx.scale, ctx.dropout, prefix, masks)
    inputs = (query, key, value, None, None, prefix_k, prefix_v, None)
    needed = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=True) if need and x is not None]
    computed = iter(torch.autograd.grad(out, needed, grad, create_graph=True))
    grads: list[Tensor | None] = []
    for need in ctx.needs_input_grad:
        grads.append(next(computed) if need else None)
    return tuple(grads)


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


def _twin(how: Plan, scale: float, query: Tensor, key: Tensor, value: Tensor, *prefix: Tensor) -> Tensor:
    """`_composed` of tensors alone."""
    return _composed(query, key, value, how, scale, prefix=(prefix[0], prefix[1]) if prefix else None)


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
        out = decoding.attend(query, key, value, scale, prefix)
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
            raise NotImplementedError(f"block-wise attention does not support {name}")
    how.used = True
    if how.record is not None:
        how.record(module, key, value)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    dropout = float(options.get("dropout") or 0.0)
    return attend(query, key, value, how, float(scale), dropout, prefix), None


def prefix_of(module: Any, key: Tensor, value: Tensor) -> PrefixKV | None:
    """What a part of an attention module puts before every text's keys and values [R, K, W, d], in their
    precision.
    """
    for part in module.children():
        prefix = part.prefix_kv() if hasattr(part, "prefix_kv") else None
        if prefix is None:
            continue
        by_head = []
        for x, like in zip(prefix, (key, value), strict=True):  # [m, K * d] -> [K, m, d]
            by_head.append(x.to(like.dtype).view(len(x), like.shape[1], -1).transpose(0, 1))
        return by_head[0], by_head[1]
    return None


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
    visible = True if mask.dtype == torch.bool else 0.0
    return F.pad(mask, (prefix[0].shape[1], 0), value=visible)


def takes_plans(model: Any) -> bool:
    """Can this network be handed a plan? Registers the attention with transformers, and with a network that
    uses SDPA.
    """
    config = model.config.get_text_config()
    if config._attn_implementation == NAME:
        _add_attention()  # a run that has ended meanwhile may have taken it back
        return True
    sources = {type(m).__module__ for m in model.modules()}
    chooses = any("ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[source]) for source in sources)
    if config._attn_implementation != "sdpa" or not chooses:
        return False
    _add_attention()
    config._attn_implementation = NAME
    return True


def _add_attention() -> None:
    """Make this attention known to transformers by its name, with SDPA's masks."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    add_entry(AttentionInterface._global_mapping, NAME, attention)
    add_entry(AttentionMaskInterface._global_mapping, NAME, sdpa_mask)


def exclude_from_compile(model: Any) -> None:
    """Where a network takes plans: torch.compile leaves its attention as it is."""
    if takes_plans(model):
        from transformers import AttentionInterface

        uncompiled = torch.compiler.disable(attention)
        add_entry(AttentionInterface._global_mapping, NAME, uncompiled, replace=True)
