"""Grafting: the entries that tuning changed most are taken from the tuned model, all others from the base.

A skill is reported to sit in very few entries: a graft of 0.01 % of them holds most of what fine-tuning
brought, with less forgotten and better calibrated (Panigrahi et al., 2023). The mask is where the paper's
search begins, the largest changes over all tensors together; of several runs the union is grafted, entries
that more than one claims as their mean. Departs: the mask is not trained further.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.mergers._base import BASE, Merger
from luthier.registry import Range, merger

OUTSIDE = ("embed", "lm_head", "wte", "wpe")  # parts of names of embeddings and heads


@merger(
    paper="arXiv:2302.06600",
    row="grafting-skill-localization",
    requires=[BASE],
    contract={"idempotent": "small changes are left out on purpose"},
    use_when="you ask how few weights hold what tuning taught, or want to add it to the base with little"
    " else.",
    costs="the changes of all tensors at once in memory, and a sort of them; inference costs one model.",
    covers="the start mask by magnitude over the whole network, grafts of one run and of several, and the"
    " overlap"
    " of their masks.",
    omits="the search that trains the mask from there, and so the sparsest masks; continual learning"
    " inside of"
    " a region.",
    tests=[
        "methods/mergers/weights/test_graft.py::test_both_ends_bit_for_bit",
        "methods/mergers/weights/test_graft.py::test_the_mask_is_the_largest_changes_of_all",
        "methods/mergers/weights/test_graft.py::test_a_planted_skill_comes_with_few_entries",
        "methods/mergers/weights/test_graft.py::test_masks_of_two_tasks",
    ],
)
class Graft(Merger):
    """Base weights with the most changed entries of the runs."""

    # of the entries that may be grafted, the share that is
    share: Annotated[float, Field(ge=0, le=1), Range(0.0001, 0.1)] = 0.01
    embeddings: bool = False  # are embeddings and output layers grafted, too?

    def merge(self, several, base=None):
        names = self.alike(several)
        if base is None:
            raise RecipeError("merger 'graft' needs the base model that the runs began with")
        places = [name for name in names if self.grafts(name) and several[0][name].is_floating_point()]
        masks = []
        for tensors in several:
            masks.append(largest_changes({n: tensors[n] for n in places}, base, self.share))
        out = {}
        for name in names:
            first = several[0][name]
            if not first.is_floating_point():
                out[name] = first.clone()
                continue
            start = torch.as_tensor(base[name]).to(device=first.device, dtype=first.dtype)
            out[name] = start.clone()
            if name not in masks[0]:
                continue
            chosen = torch.stack([mask[name] for mask in masks])
            if len(several) == 1:
                out[name] = torch.where(chosen[0], first, start)
                continue
            values = torch.stack([tensors[name].double() for tensors in several])
            mean = (values * chosen).sum(0) / chosen.sum(0).clamp(min=1)
            out[name] = torch.where(chosen.any(0), mean.to(first.dtype), start)
        return out

    def grafts(self, name: str) -> bool:
        return self.embeddings or not any(part in name for part in OUTSIDE)


def largest_changes(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Masks of the share of entries that changed most, over all tensors together. Of equal changes the
    earlier entries count; what did not change is never among them, unless the share is 1.
    """
    sizes = {name: tensor.numel() for name, tensor in tuned.items()}
    if not sizes:
        return {}
    changes = []
    for name, tensor in tuned.items():
        start = torch.as_tensor(base[name]).to(tensor.device)
        changes.append((tensor.float() - start.float()).abs().flatten())
    flat = torch.cat(changes)
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.argsort(descending=True, stable=True)[: round(share * len(flat))]] = True
    if share < 1:
        chosen &= flat > 0
    parts = chosen.split(list(sizes.values()))
    return {name: part.view_as(tuned[name]) for name, part in zip(tuned, parts, strict=True)}


def overlap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Of the entries in the second mask, the share that is in the first; by chance its density."""
    both = sum(int((one[name] & other[name]).sum()) for name in other)
    total = sum(int(mask.sum()) for mask in other.values())
    return both / total if total else 0.0
