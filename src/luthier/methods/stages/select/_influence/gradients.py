"""The gradient of each row's loss with respect to all that trains."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from luthier.methods.tuners._base import Component
from luthier.model.layout import rows_apart


def parameters(tuned: Any, only: Collection[str] | None = None) -> list[Tensor]:
    """What trains, in the order of the gradients' entries. only: names of groups; None: all."""
    tensors = []
    for group in tuned.param_groups():
        if only is None or group.name in only:
            tensors += [p for p in group.params.values() if p.requires_grad]
    return tensors


def row_losses(policy: Any, batch: Any) -> Tensor:
    """[G] mean -log p of the supervised tokens of each row; of several completions their mean."""
    means = -batch.means(policy.logprobs(batch).float())
    counts = torch.bincount(batch.group, minlength=len(batch.rows)).to(means)
    return means.new_zeros(len(batch.rows)).index_add(0, batch.group, means) / counts.clamp(min=1)


def row_gradients(roles: Any, rows: Sequence[dict], only: Collection[str] | None = None) -> Tensor:
    """[G, D] in fp32 the gradient of each row's loss, without dropout. Where plain LoRA alone trains, all
    rows take one forward and one backward pass. only: names of groups; None: all that trains.
    """
    layers = lora_layers(roles.policy.attached, only)
    with roles.policy.eval_mode(), rows_apart(), torch.enable_grad():
        if layers is None:
            return torch.cat([_alone(roles, row, only) for row in rows])
        return _together(roles, rows, layers)


def lora_layers(tuned: Any, only: Collection[str] | None) -> dict[str, Any] | None:
    """Name -> layer in the order of what trains, where each trains one A and one B and nothing else does."""
    if not hasattr(tuned, "layers") or tuned.why_not_batched() is not None:
        return None
    layers = {}
    for each in tuned.param_groups():
        if only is not None and each.name not in only:
            continue
        layer = tuned.layers.get(each.name)
        if layer is None or list(each.params) != ["A", "B"] or len(layer.updates()) != 1:
            return None
        if not all(p.requires_grad for p in each.params.values()):
            return None
        layers[each.name] = layer
    return layers


def _alone(roles: Any, row: dict, only: Collection[str] | None) -> Tensor:
    """[1, D] of one row, by a backward pass of its own."""
    tensors = parameters(roles.policy.attached, only)
    batch = roles.batch([row])
    grads = torch.autograd.grad(row_losses(roles.policy, batch).sum(), tensors, allow_unused=True)
    parts = []
    for p, g in zip(tensors, grads, strict=True):
        parts.append(torch.zeros_like(p).flatten() if g is None else g.flatten())
    return torch.cat(parts).float()[None]


class _Watch(Component):
    """What each layer reads, the gradient of what it gives, and of which row each place is."""

    per_row = True

    def __init__(self) -> None:
        self.rows: Tensor | None = None  # [R, W] or [R]
        self.inputs: dict[str, Tensor] = {}
        self.slopes: dict[str, Tensor] = {}

    def on_rows(self, batch: Any, rows: Tensor) -> None:
        self.rows = rows

    def see(self, name: str, module: Any, inputs: Any, output: Tensor) -> None:
        if not output.requires_grad:  # a pass that only measures
            return
        self.inputs[name] = inputs[0].detach()
        output.register_hook(partial(self.slopes.__setitem__, name))

    def places(self, shape: torch.Size, count: int) -> list[Tensor]:
        """[G] the places of each row in tensors of this shape, flattened."""
        assert self.rows is not None
        rows = self.rows
        while rows.ndim < len(shape):
            rows = rows[..., None]
        flat = rows.expand(shape).flatten()
        return [(flat == row).nonzero()[:, 0] for row in range(count)]


@contextmanager
def _watching(tuned: Any, layers: dict[str, Any]) -> Iterator[_Watch]:
    watch, handles = _Watch(), []
    tuned.others.append(watch)
    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(partial(watch.see, name)))
    try:
        yield watch
    finally:
        tuned.others.remove(watch)
        for handle in handles:
            handle.remove()


def _together(roles: Any, rows: Sequence[dict], layers: dict[str, Any]) -> Tensor:
    """With y = W x + s B A x, the gradient of a row is s (B' g)' x for A and s g' (A x) for B, summed over
    its tokens: g and x of all rows come from one pass.
    """
    policy = roles.policy
    batch = roles.batch(rows)
    with _watching(policy.attached, layers) as watch:
        loss = row_losses(policy, batch).sum()
        torch.autograd.grad(loss, parameters(policy.attached, layers), allow_unused=True)
    return _from_parts(watch, layers, len(rows))


@torch.no_grad()
def _from_parts(watch: _Watch, layers: dict[str, Any], count: int) -> Tensor:
    """[G, D] of what each layer read and the gradient of what it gave."""
    out, places = [], None
    for name, layer in layers.items():
        ((A, B, scale),) = layer.updates()
        x, g = watch.inputs.get(name), watch.slopes.get(name)
        if x is None or g is None:  # nothing that is supervised depends on it
            out.append(A.new_zeros(count, A.numel() + B.numel(), dtype=torch.float32))
            continue
        if places is None:
            places = watch.places(x.shape[:-1], count)
        x, g = x.reshape(-1, x.shape[-1]).float(), scale * g.reshape(-1, g.shape[-1]).float()
        low, back = x @ A.float().T, g @ B.float()
        parts = []
        for own in places:
            of_A, of_B = back[own].T @ x[own], g[own].T @ low[own]
            parts.append(torch.cat([of_A.flatten(), of_B.flatten()]))
        out.append(torch.stack(parts))
    return torch.cat(out, 1)


def adam_direction(
    gradients: Tensor, m: Tensor, v: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> Tensor:
    """[G, D] where one step of Adam from the moments m, v [D] would go with each gradient; without correction
    of the moments' bias, as LESS has it.
    """
    first = betas[0] * m + (1 - betas[0]) * gradients
    second = betas[1] * v + (1 - betas[1]) * gradients.square()
    return first / (second + eps).sqrt()
