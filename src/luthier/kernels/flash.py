"""Attention over packed sequences by torch's own flash attention for sequences of different lengths, on CUDA
in half precision.

A layout becomes a few calls (`Calls`). Pieces that follow each other without a branch are one causal
sequence, so a batch that shares nothing is one call. Where pieces share what stands before them, the pieces
of each depth are met by all that continues them in a call of their own, which reads them once; the calls'
results are joined by their log-sum-exps. A backward by the joint output and log-sum-exp gives each call its
part of the gradient, as if all had been one. Whether the operation answers rightly on this device is tried
once, on a tree of a few tokens (`works`); else, and for what it cannot do (dropout, scores that are changed,
windows across branches), attention stays in blocks (attention.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from luthier.kernels.layout import Layout
from luthier.kernels.lora import differentiable_grads
from luthier.kernels.transfer import to_device

LARGEST_HEAD = 256  # numbers of a head that the operation takes, in multiples of 8
Span = tuple[int, int]  # first flat position, and the one behind the last
OPERATION_ERRORS = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError)


@dataclass(frozen=True)
class Call:
    """Stretches of queries, each with one of keys; together they are all positions, and some have no keys or
    no queries.
    """

    queries: Tensor  # [n + 1] int32: where stretches of queries begin, and the end
    keys: Tensor  # [n + 1] int32
    most_queries: int
    most_keys: int
    causal: bool


@dataclass(frozen=True)
class Calls:
    """How attention over a layout is computed. The first call's sequences meet themselves."""

    calls: list[Call]
    window: int | None


def calls_of(layout: Layout, window: int | None = None, chunk: int | None = None) -> Calls | None:
    """The calls for a layout, on its device; None where it is none of those that can be computed so."""
    host = layout.host or layout
    runs = _runs(host)
    if runs is None or chunk:
        return None
    causal = [(run.span, run.span) for run in runs if not run.both]
    from_both_sides = [(run.span, run.span) for run in runs if run.both]
    by_depth: dict[int, list[tuple[Span, Span]]] = {}
    for run in runs:
        if run.end > run.span[1]:
            by_depth.setdefault(run.depth, []).append(((run.span[1], run.end), run.span))
    if window and (by_depth or from_both_sides):
        return None
    size = host.piece.numel()
    stretches = [(_stretches(causal, size), True)] if causal else []
    for pairs in (from_both_sides, *by_depth.values()):
        if pairs:
            stretches.append((_stretches(pairs, size), False))
    tensors = {}
    for i, ((queries, keys), _) in enumerate(stretches):
        tensors[f"q{i}"], tensors[f"k{i}"] = queries, keys
    sent = to_device(tensors, layout.piece.device)
    calls = []
    for i, ((queries, keys), is_causal) in enumerate(stretches):
        # with a single query the operation takes another way, whose log-sum-exps have another shape
        most = max(2, int(queries.diff().max()))
        calls.append(Call(sent[f"q{i}"], sent[f"k{i}"], most, max(1, int(keys.diff().max())), is_causal))
    return Calls(calls, window)


@dataclass
class _Run:
    """Pieces that follow each other without a branch."""

    span: Span
    end: int  # behind the last position of all that continues it
    depth: int  # runs above it
    both: bool  # is it read from both sides?


def _runs(host: Layout) -> list[_Run] | None:
    """The runs of a layout in the order of their positions; None where what continues a piece does not stand
    right behind it.
    """
    pieces, sizes = host.piece.flatten().unique_consecutive(return_counts=True)
    parents = _parents(host, pieces[pieces >= 0])
    if parents is None:
        return None
    children = Counter(parents)
    runs: list[_Run] = []
    run_of: list[_Run] = []  # the run of each piece so far
    start = 0
    for piece, size in zip(pieces.tolist(), sizes.tolist(), strict=True):
        stop = start + size
        if piece < 0:
            start = stop
            continue
        parent, both = parents[len(run_of)], bool(host.both[piece])
        above = run_of[parent] if parent >= 0 else None
        if above is not None and above.end != start:
            return None
        if above is not None and children[parent] == 1 and not (above.both or both):
            above.span = (above.span[0], stop)
            run_of.append(above)
        else:
            depth = 0 if above is None else above.depth + 1
            runs.append(_Run((start, stop), stop, depth, both))
            run_of.append(runs[-1])
        run_of[-1].end = stop
        while parent >= 0:
            run_of[parent].end = stop
            parent = parents[parent]
        start = stop
    return runs


def _parents(host: Layout, pieces: Tensor) -> list[int] | None:
    """For each of the pieces, in the order of their positions, the index of the one that it continues, -1 for
    a root; None where a piece stands in two places, or before one that it continues.
    """
    if len(pieces.unique()) < len(pieces):
        return None
    parents = []
    for i, row in enumerate(host.sees[pieces][:, pieces]):
        visible = row.nonzero().squeeze(1).tolist()
        if visible[-1] != i:
            return None
        parents.append(visible[-2] if len(visible) > 1 else -1)
    return parents


def _stretches(pairs: Sequence[tuple[Span, Span]], size: int) -> tuple[Tensor, Tensor]:
    """Pairs of queries and keys, in order, as stretches that cover all positions of both."""
    queries, keys = [0], [0]

    def add(query_stop: int, key_stop: int) -> None:
        if (query_stop, key_stop) != (queries[-1], keys[-1]):
            queries.append(query_stop)
            keys.append(key_stop)

    for (first_query, query_stop), (first_key, key_stop) in pairs:
        add(first_query, keys[-1])  # queries that meet nothing here
        add(queries[-1], first_key)  # keys that nothing meets
        add(query_stop, key_stop)
    add(size, keys[-1])
    add(queries[-1], size)
    return torch.tensor(queries, dtype=torch.int32), torch.tensor(keys, dtype=torch.int32)


# ------------------------------------------------------------ computed


def suits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Can the operation take these tensors [R, H, W, d], and does it answer rightly here?"""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    size = query.shape[3]
    if key.dtype != query.dtype or value.dtype != query.dtype or value.shape[3] != size:
        return False
    if size % 8 or size > LARGEST_HEAD:
        return False
    return works(query.device, query.dtype, size, query.shape[1] // key.shape[1])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    calls: Calls,
    scale: float,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    composed: Callable[..., Tensor],
) -> Tensor:
    """query [R, H, W, d], key and value [R, K, W, d] -> [R, W, H, d]. prefix_k, prefix_v [K, m, d]: seen by
    all. composed: the same of (query, key, value, prefix_k, prefix_v) by operations that torch
    differentiates.
    """
    return _Flash.apply(query, key, value, calls, scale, prefix_k, prefix_v, composed)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        calls: Calls,
        scale: float,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        composed: Callable[..., Tensor],
    ) -> Tensor:
        rows, _, width, _ = query.shape
        q, k, v = _flat(query), _flat(key), _flat(value)
        outs, lses, states = [], [], []
        for call, keys, values in _each(calls, k, v, prefix_k, prefix_v):
            out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
                q,
                keys,
                values,
                call.queries,
                call.keys,
                call.most_queries,
                call.most_keys,
                0.0,
                call.causal,
                False,
                scale=scale,
                window_size_left=_left(calls, call),
                window_size_right=0 if call.causal else -1,
            )
            outs.append(out)
            lses.append(lse)
            states.append((state, unused))
        out, lse = (outs[0], lses[0]) if len(outs) == 1 else _joined(outs, lses)
        ctx.save_for_backward(query, key, value, prefix_k, prefix_v, out, lse)
        ctx.calls, ctx.scale, ctx.composed, ctx.states = calls, scale, composed, states
        return out.view(rows, width, *out.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prefix_k, prefix_v, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: somebody will differentiate this gradient
            present = [x for x in (query, key, value, prefix_k, prefix_v) if x is not None]
            twice = differentiable_grads(ctx.composed, present, grads[0])
            d_prefix = twice[3:] or [None, None]
            return *twice[:3], None, None, *d_prefix, None
        calls, scale = ctx.calls, ctx.scale
        q, k, v = _flat(query), _flat(key), _flat(value)
        grad = grads[0].reshape(out.shape)
        d_q = d_k = d_v = None
        d_prefix: list[Tensor | None] = [None, None]
        parts = zip(_each(calls, k, v, prefix_k, prefix_v), ctx.states, strict=True)
        for (call, keys, values), (state, unused) in parts:
            more_q, more_k, more_v = torch.ops.aten._flash_attention_backward(
                grad,
                q,
                keys,
                values,
                out,
                lse,
                call.queries,
                call.keys,
                call.most_queries,
                call.most_keys,
                0.0,
                call.causal,
                state,
                unused,
                scale=scale,
                window_size_left=_left(calls, call),
                window_size_right=0 if call.causal else -1,
            )
            d_q = _sum(d_q, more_q)
            if keys is k:
                d_k, d_v = _sum(d_k, more_k), _sum(d_v, more_v)
            else:
                d_prefix = [more_k.transpose(0, 1), more_v.transpose(0, 1)]
        shaped = []
        for total, like in ((d_q, query), (d_k, key), (d_v, value)):
            rows, heads, width, size = like.shape
            assert total is not None
            shaped.append(total.to(like.dtype).view(rows, width, heads, size).transpose(1, 2))
        return *shaped, None, None, *d_prefix, None


def _flat(x: Tensor) -> Tensor:
    """[R, H, W, d] -> [R * W, H, d]"""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _each(
    calls: Calls, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None
) -> list[tuple[Call, Tensor, Tensor]]:
    """Calls with the keys and values that they meet."""
    every = [(call, k, v) for call in calls.calls]
    if prefix_k is not None and prefix_v is not None:
        ends = to_device(
            {
                "queries": torch.tensor([0, len(k)], dtype=torch.int32),
                "keys": torch.tensor([0, prefix_k.shape[1]], dtype=torch.int32),
            },
            k.device,
        )
        call = Call(ends["queries"], ends["keys"], max(2, len(k)), prefix_k.shape[1], False)
        every.append((call, prefix_k.transpose(0, 1).contiguous(), prefix_v.transpose(0, 1).contiguous()))
    return every


def _left(calls: Calls, call: Call) -> int:
    """How many keys before its own a query meets; -1: all."""
    return calls.window - 1 if calls.window and call.causal else -1


def _joined(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[T, H, d] outputs and [H, T] log-sum-exps of several calls -> those of all keys together. Where a query
    met no keys, the operation says 0 and +inf.
    """
    every = torch.stack(lses)
    every = every.masked_fill(every == torch.inf, -torch.inf)
    lse = every.logsumexp(0)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # padding, which meets nothing at all
    shares = (every - lse).exp().transpose(1, 2)[..., None]
    joint = shares[0] * outs[0]
    for share, out in zip(shares[1:], outs[1:], strict=True):
        joint.addcmul_(share, out)
    return joint.to(outs[0].dtype), lse


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    """Parts of a gradient are added in fp32."""
    return part if total is None else total.float().add_(part)


@cache
def works(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> bool:
    """Does the operation answer, and differentiate, as a mask over the whole row does? size: of a head;
    repeats: queries' heads for each of the keys'.
    """
    piece = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3 + [3] * 6])
    sees = torch.eye(4, dtype=torch.bool)
    sees[1:3, 0] = True  # two pieces continue the first, the last is by itself
    index = torch.zeros_like(piece)
    tensors = {
        "source": index,
        "position": index,
        "piece": piece,
        "soft": index - 1,
        "at": index[0],
        "place": index[0],
        "sees": sees,
        "both": torch.zeros(4, dtype=torch.bool),
    }
    rng = torch.Generator().manual_seed(0)

    def leaf(heads: int) -> Tensor:
        x = torch.randn(1, heads, piece.shape[1], size, generator=rng)
        return x.to(dtype).to(device).requires_grad_()

    q, k, v = leaf(repeats), leaf(1), leaf(1)
    weight = leaf(repeats).detach().transpose(1, 2)
    scale = size**-0.5
    on_device: dict[str, Any] = to_device(tensors, device)
    on_host: dict[str, Any] = dict(tensors)
    sent = Layout(**on_device, host=Layout(**on_host))
    calls = calls_of(sent)
    assert calls is not None
    try:
        with torch.enable_grad():
            out = attend(q, k, v, calls, scale, None, None, _never)
            grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
            wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
            q, k, v = wide
            k, v = k.expand(-1, repeats, -1, -1), v.expand(-1, repeats, -1, -1)
            scores = (q @ k.transpose(2, 3) * scale).masked_fill(~sent.mask(), -torch.inf)
            expected = (scores.softmax(-1) @ v).transpose(1, 2)
            expected_grads = torch.autograd.grad((expected * weight).sum(), wide)
    except OPERATION_ERRORS:
        return False
    for answer, right in zip((out, *grads), (expected, *expected_grads), strict=True):
        gap = (answer.float() - right).norm() / right.norm()
        if not bool(gap < 0.02):  # a number that is not finite fails too
            return False
    return True


def _never(*inputs: Tensor) -> Tensor:
    raise NotImplementedError
