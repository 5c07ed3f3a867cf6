"""Sparse deltas: W + S, where S has k entries, stored as k positions and k values. Adapters compose by
addition.

No tensor of a weight's size outlives its layer: S is materialised for the multiplication and freed, and so is
the gradient of W' in the backward pass, of which only the k entries are kept. `p.watch`, if set, receives
that gradient before it is freed, so that new positions can be chosen by gradient. Quantized bases are never
dequantized as a whole, since S is only added to their output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.tuners._delta import Delta, frozen
from luthier.registry import Range, family


@family
class Sparse(Delta):
    """Family: some entries of every chosen weight are trained."""

    # S is multiplied with as W is: its values stay in fp32, and x S' has the model's precision
    precise: ClassVar[bool] = False

    # share of each weight's entries that is trained
    density: Annotated[float, Field(gt=0, le=1), Range(0.001, 0.1, log=True)] = 0.01

    def count(self, W: Tensor) -> int:
        """How many entries of this weight move; one at least."""
        return max(1, round(self.density * W.numel()))

    def support(self, W: Tensor) -> Tensor:
        """[k] different places in W.flatten(). Random unless a method knows better."""
        return some_of(W.numel(), self.count(W))

    def init(self, W):
        places = self.support(W).sort().values
        return {"indices": frozen(places.to(place_type(W.numel()))), "values": torch.zeros(len(places))}

    def entry_places(self, slot, p):
        return p.indices if slot == "values" else None

    def weight(self, W, p):
        return W + spread(p.values, p.indices, W.shape).to(W.dtype)

    def forward(self, x, y, p, layer):
        if not len(p.values):
            return y
        return add(x, y, p.values, p.indices, p.watch)


def some_of(n: int, k: int) -> Tensor:
    """[k] different numbers below n, each set of them as likely as any other. Takes memory and time for k,
    not for n.
    """
    if 2 * k > n:
        return torch.randperm(n)[:k]
    drawn = torch.randint(n, (k,)).unique()
    while len(drawn) < k:
        drawn = torch.cat([drawn, torch.randint(n, (k - len(drawn),))]).unique()
    return drawn


def greatest(values: Tensor, k: int) -> Tensor:
    """[k] positions of the largest of [n] values. Where k is a small share of many, a sample tells below
    which none can be one.
    """
    n, sample = len(values), 2**16
    if n < 2**20 or 8 * k > n:
        return values.topk(k).indices
    strided = values[:: n // sample]
    bound = strided.kthvalue(len(strided) - min(len(strided) - 1, 2 * k * len(strided) // n + 8)).values
    above = (values >= bound).nonzero().flatten()
    return above[values[above].topk(k).indices] if len(above) >= k else values.topk(k).indices


def place_type(n: int) -> torch.dtype:
    """The smaller whole number that counts to n."""
    return torch.int32 if n < 2**31 else torch.int64


def spread(values: Tensor, indices: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """[k] values at [k] flat places -> the matrix that they are the entries of, zero elsewhere."""
    flat = values.new_zeros(shape[0] * shape[1])
    return flat.index_copy(0, indices.long(), values).view(*shape)


def add(
    x: Tensor, y: Tensor, values: Tensor, indices: Tensor, watch: Callable[[Tensor], None] | None = None
) -> Tensor:
    """x [.., in], y [.., out] -> y + x S'. watch is called with the gradient of S, [out, in], as if all
    entries moved.
    """
    return _Add.apply(x, y, values, indices, watch)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, values: Tensor, indices: Tensor, watch: Any) -> Tensor:
        ctx.save_for_backward(x, values, indices)
        ctx.shape, ctx.watch = (y.shape[-1], x.shape[-1]), watch
        S = spread(values.to(x.dtype), indices, ctx.shape)
        return torch.addmm(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), S.T).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        wants_x, wants_y, wants_values, *_ = ctx.needs_input_grad
        grad = grads[0].reshape(-1, ctx.shape[0])
        d_x = (grad @ spread(values.to(x.dtype), indices, ctx.shape)).view(x.shape) if wants_x else None
        d_values = None
        if wants_values:
            G = grad.T @ x.reshape(-1, ctx.shape[1])  # the dense gradient of this one weight
            d_values = G.flatten()[indices.long()].to(values.dtype)
            if ctx.watch is not None:
                ctx.watch(G)
        return d_x, grads[0] if wants_y else None, d_values, None, None


def largest(magnitudes: Mapping[str, Callable[[], Tensor]], k: int) -> dict[str, Tensor]:
    """The k largest of several tensors together: name -> flat places. Each is made when asked for; they are
    never side by side.

    The threshold is found by halving: non-negative floats are in the order of their bits. Of equals the first
    are taken.
    """
    device = next(iter(magnitudes.values()))().device
    infinite = torch.tensor(float("inf")).view(torch.int32).item()
    low = torch.zeros((), dtype=torch.int64, device=device)
    high = torch.full_like(low, infinite)
    for _ in range(infinite.bit_length()):  # the greatest threshold that at least k numbers reach
        middle = (low + high + 1) // 2
        bound = middle.to(torch.int32).view(torch.float32)
        count = torch.zeros_like(low)
        for make in magnitudes.values():
            count += (make() >= bound).sum()
        low, high = torch.where(count >= k, middle, low), torch.where(count >= k, high, middle - 1)
    bound = low.to(torch.int32).view(torch.float32)
    above = {n: (make() > bound).nonzero().flatten() for n, make in magnitudes.items()}
    left, out = k - sum(len(p) for p in above.values()), {}
    for name, make in magnitudes.items():
        equal = (make() == bound).nonzero().flatten()[: max(left, 0)]
        left -= len(equal)
        out[name] = torch.cat([above.pop(name), equal]).sort().values
    return out


def smallest(values: Tensor, n: int) -> Tensor:
    """[n] positions in `values` of the smallest magnitudes; of equals the first."""
    return values.abs().argsort(stable=True)[:n]


@torch.no_grad()
def regrow(values: Tensor, indices: Tensor, dropped: Tensor, grown: Tensor) -> Tensor:
    """Exchange places: what stood at positions `dropped` (of values) goes, and the flat places `grown` come
    in, at zero.

    A place that goes and comes at once stays as it is. In place. Returns the [k] mask of what is new, for
    `Component.on_phase`.
    """
    leaving = indices[dropped].long()
    stays = torch.isin(leaving, grown)
    dropped, grown = dropped[~stays], grown[~torch.isin(grown, leaving)]
    dropped, grown = dropped[: len(grown)], grown[: len(dropped)]
    indices[dropped] = grown.to(indices.dtype)
    values[dropped] = 0
    return torch.zeros(len(values), dtype=torch.bool, device=values.device).index_fill_(0, dropped, True)
