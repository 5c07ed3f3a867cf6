"""What runs changed of their base model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.errors import RecipeError

Combine = Callable[[str, list[Tensor]], Tensor]  # name, changes in float64 -> their combination


def with_changes(
    merger: Any, several: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None, combine: Combine
) -> dict[str, Tensor]:
    """base + combine(changes), one tensor after another; tensors that are no numbers with a point stay.
    Raises RecipeError without a base.
    """
    names = merger.alike(several)
    if base is None:
        raise RecipeError(f"merger '{merger.name}' needs the base model that the runs began with")
    out = {}
    for name in names:
        first = several[0][name]
        if not first.is_floating_point():
            out[name] = first.clone()
            continue
        start = torch.as_tensor(base[name]).to(first.device).double()
        changes = [tensors[name].double() - start for tensors in several]
        out[name] = (start + combine(name, changes)).to(first.dtype)
    return out


def weights_for(
    merger: Any, weights: Sequence[float] | None, several: Sequence[Any], default: float
) -> list[float]:
    """A weight for each run. Raises RecipeError where there are more or fewer of them."""
    if weights is None:
        return [default] * len(several)
    if len(weights) != len(several):
        raise RecipeError(f"merger '{merger.name}' has {len(weights)} weights for {len(several)} runs")
    return list(weights)


def weighted_sum(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum of changes, each times its weight."""
    total = torch.zeros_like(changes[0])
    for weight, change in zip(weights, changes, strict=True):
        total += weight * change
    return total


def largest(change: Tensor, count: int) -> Tensor:
    """The change, with all but its `count` largest entries by magnitude at 0."""
    flat = change.abs().flatten()
    mask = torch.zeros_like(flat)
    if count:
        mask[flat.topk(count).indices] = 1
    return change * mask.view_as(change)


def agreeing(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES' merge: at each entry, the weighted mean of the changes whose sign is that of the weighted sum."""
    stack = torch.stack([weight * change for weight, change in zip(weights, changes, strict=True)])
    sign = stack.sum(0).sign()
    agree = (stack.sign() == sign) & (stack != 0)
    shares = torch.tensor(weights, dtype=stack.dtype, device=stack.device).abs()
    total = (agree * shares.view(-1, *[1] * (stack.dim() - 1))).sum(0)
    return torch.where(total > 0, (stack * agree).sum(0) / total.clamp(min=1e-12), torch.zeros_like(total))
