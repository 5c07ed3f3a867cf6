"""What layers read, and how the loss leans on their weights, on a few rows: for starts that are taken from
data.

A statistic is yielded layer by layer and let go. As many layers as fit `BUDGET` are gathered in one reading
of the rows; where more are asked for, the rows are read again. Rows are read singly for what layers read, so
no filling is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.quantizers._base import Quantized
from luthier.methods.tuners._delta import lies_sideways, oriented

BUDGET = 2**28  # numbers gathered at once, in fp32: a gigabyte
MICRO = 4  # rows whose gradients are taken at once


def statistics(
    kind: str, layers: Mapping[str, Any], rows: list[dict], roles: Any
) -> Iterator[tuple[str, Tensor]]:
    """name -> module, with `get_base_layer` where it is wrapped. Yields name and what was gathered, in fp32,
    in their order.

    inputs: [n, in] what the module reads, token by token. covariance: [in, in] the sum over tokens of x x', x
    over the largest |x|, by rows. gradients: [out, in] of the mean -log p of the supervised tokens.
    """
    if not rows:
        raise RecipeError("a start from data wants rows")
    with torch.no_grad():  # what is measured of a network at its first reading is not counted
        roles.policy.logprobs(roles.batch(rows[:1]))
    gather = {"inputs": _inputs, "covariance": _covariance, "gradients": _gradients}[kind]
    group: dict[str, Any] = {}
    size = 0
    for name, layer in layers.items():
        out_, in_ = oriented(base_of(layer)).shape
        mine = {"inputs": 4096 * in_, "covariance": in_ * in_, "gradients": out_ * in_}[kind]
        if group and size + mine > BUDGET:
            yield from _drain(gather(group, rows, roles))
            group, size = {}, 0
        group[name], size = layer, size + mine
    yield from _drain(gather(group, rows, roles))


def base_of(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _drain(found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name in list(found):
        yield name, found.pop(name)


@contextmanager
def _reading(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`see` is called with what each module reads, [n, in] in fp32."""

    def hook(name: str):
        return lambda module, given, y: see(name, given[0].detach().flatten(0, -2).float())

    hooks = [m.register_forward_hook(hook(n)) for n, m in layers.items()]
    try:
        with torch.no_grad():
            yield
    finally:
        for h in hooks:
            h.remove()


def _inputs(layers: Mapping[str, nn.Module], rows: list[dict], roles: Any) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {n: [] for n in layers}
    with _reading(layers, lambda name, x: seen[name].append(x)):
        for row in rows:
            roles.policy.logprobs(roles.batch([row]))
    unread = [n for n, x in seen.items() if not x]
    if unread:
        raise RecipeError(
            f"none of {len(rows)} rows reaches {unread[0]}: give more rows (init_rows), or leave it out"
        )
    return {n: torch.cat(x) for n, x in seen.items()}


def _covariance(layers: Mapping[str, Any], rows: list[dict], roles: Any) -> dict[str, Tensor]:
    total, most = {}, dict.fromkeys(layers, 0.0)
    for name, layer in layers.items():
        W = oriented(base_of(layer))
        total[name] = torch.zeros(W.shape[1], W.shape[1], dtype=torch.float32, device=W.device)

    def see(name: str, x: Tensor) -> None:
        total[name].addmm_(x.T, x)
        most[name] = max(most[name], float(x.abs().max()))

    with _reading(layers, see):
        for row in rows:
            roles.policy.logprobs(roles.batch([row]))
    unread = [n for n, m in most.items() if not m]
    if unread:
        raise RecipeError(
            f"none of {len(rows)} rows reaches {unread[0]}: give more rows (init_rows), or leave it out"
        )
    return {n: C.div_(len(rows) * most[n] ** 2) for n, C in total.items()}


def _gradients(layers: Mapping[str, Any], rows: list[dict], roles: Any) -> dict[str, Tensor]:
    bases = {n: base_of(m) for n, m in layers.items()}
    codes = {n: b for n, b in bases.items() if isinstance(b, Quantized)}
    weights = {n: b.weight for n, b in bases.items() if n not in codes}
    total = {n: torch.zeros(w.shape, dtype=torch.float32, device=w.device) for n, w in weights.items()}
    count = 0

    def add(name: str):
        def hook(p: Tensor) -> None:
            if p.grad is not None:
                total[name] += p.grad
            p.grad = None

        return hook

    for n, b in codes.items():
        total[n] = torch.zeros(b.size, dtype=torch.float32, device=next(iter(b.codes.values())).device)
        b.watch = total[n].add_
    hooks = [w.requires_grad_(True).register_post_accumulate_grad_hook(add(n)) for n, w in weights.items()]
    try:
        with torch.enable_grad():
            for i in range(0, len(rows), MICRO):
                batch = roles.batch(rows[i : i + MICRO])
                count += batch.count("token")
                roles.policy.logprobs(batch).sum().neg().backward()
    finally:
        for h in hooks:
            h.remove()
        for w in weights.values():
            w.requires_grad_(False)
        for b in codes.values():
            b.watch = None
    return {
        n: (g.T if n in weights and lies_sideways(bases[n]) else g) / max(count, 1) for n, g in total.items()
    }
