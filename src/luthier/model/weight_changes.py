"""What fine-tuning changed in the weights: size, rank and new directions of each matrix's change."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luthier.model.anatomy import layer_of

WIDEST = 2048  # of a matrix whose singular values are still computed: beyond, each takes minutes
FIRST = 10  # singular vectors that are compared with those of the base
ALIKE = 0.5  # a cosine below which a direction is new
SPECTRUM = 64  # singular values shown
SAME = 1e-5  # entries that moved no further count as unchanged (Mukherjee et al., 2025)
WRAPPERS = re.compile(r"\.base_layer\b|^base_model\.model\.")  # what adapters add to names


def plain_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The network's own matrices inside its layers, under the names that the network itself gives them; what
    an adapter brings beside them is left out.
    """
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    own = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2 or layer_of(name) is None:
            continue
        over = [w for w in wrapped if name.startswith(f"{w}.")]
        if all(name.startswith(f"{w}.base_layer.") for w in over):
            own[WRAPPERS.sub("", name)] = parameter
    return own


@torch.no_grad()
def cosines(before: Tensor, after: Tensor, k: int = 10) -> Tensor:
    """[r, k]: |cosine| of each left singular vector of `before` with each of the first k of `after`, both
    [rows, columns].
    """
    old = torch.linalg.svd(before.float(), full_matrices=False).U
    new = torch.linalg.svd(after.float(), full_matrices=False).U[:, :k]
    return (old.T @ new).abs()


def likeness(before: Tensor, after: Tensor, k: int = 10) -> list[float]:
    """Of the first k left singular vectors of `after` [rows, columns], the largest |cosine| with any of
    `before`'s.
    """
    return cosines(before, after, k).amax(0).tolist()


@torch.no_grad()
def unchanged(before: Tensor, after: Tensor, within: float = SAME) -> float:
    """Share of the entries that moved no further than `within`."""
    return float(((after.float() - before.float()).abs() <= within).float().mean())


@torch.no_grad()
def rank_ratio(change: Tensor) -> float:
    """Numerical rank of a change [rows, columns] as a share of the largest possible; 0 where nothing
    changed.
    """
    return int(torch.linalg.matrix_rank(change.double())) / min(change.shape)


def intruding(before: Tensor, after: Tensor, k: int = 10, epsilon: float = ALIKE) -> list[int]:
    """Which of the first k singular directions of `after` resemble none of `before`'s: their largest cosine
    is below `epsilon`.
    """
    return [j for j, cosine in enumerate(likeness(before, after, k)) if cosine < epsilon]


@torch.no_grad()
def scaled(weight: Tensor, directions: Sequence[int], factor: float) -> Tensor:
    """The matrix with the singular values at these places times `factor`: 1 leaves it bit for bit, 0 takes
    the directions out.
    """
    if factor == 1 or not directions:
        return weight.clone()
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    some = list(directions)
    change = (u[:, some] * s[some] * (factor - 1)) @ v[some]
    return (weight.double() + change).to(weight.dtype)


@torch.no_grad()
def effective_rank(change: Tensor) -> float:
    """exp of the entropy of the singular values as shares (Roy and Vetterli, 2007)."""
    s = torch.linalg.svdvals(change.double())
    p = (s / s.sum()).clamp(min=1e-12)
    return float(torch.exp(-(p * p.log()).sum()))


@torch.no_grad()
def weight_changes(before: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """Each matrix of the tuned network (merged) against the untuned one.

    {matrices: [{name, layer, part, moved, unchanged, rank, rank_ratio, new, overlap}], spectrum: [..], of:
    name, unlike: names}. moved: the norm of the change by that of the matrix; unchanged: share of its entries
    that moved no further than SAME; rank: effective rank of the change; rank_ratio: its numerical rank by
    the largest possible; new: how many of its first singular vectors the old matrix does not have; overlap:
    of the spaces that the first ones span, 1 where they are the same. spectrum: singular values of the
    largest change, the first being 1.
    """
    changes, unlike, largest, spectrum, of = [], [], 0.0, [], ""
    for name, parameter in plain_matrices(model).items():
        old = before.get(name)
        if old is None or old.shape != parameter.shape:
            unlike.append(name)
            continue
        old, new = old.float().cpu(), parameter.detach().float().cpu()
        change = new - old
        moved = float(change.norm() / old.norm().clamp(min=1e-12))
        place = layer_of(name)
        row = {
            "name": name,
            "layer": place[1] if place else None,
            "part": ".".join(name.split(".")[-3:-1]),
            "moved": moved,
            "unchanged": unchanged(old, new),
        }
        if moved and min(new.shape) <= WIDEST:
            alike = cosines(old, new, FIRST)
            row["rank"] = effective_rank(change)
            row["rank_ratio"] = rank_ratio(change)
            row["new"] = int((alike.amax(0) < ALIKE).sum())
            row["overlap"] = float(alike[:FIRST].square().sum() / alike.shape[1])
            if moved > largest:
                values = torch.linalg.svdvals(change)
                largest, of, spectrum = moved, name, (values / values[0]).tolist()[:SPECTRUM]
        changes.append(row)
    return {"matrices": changes, "spectrum": spectrum, "of": of, "unlike": unlike}
