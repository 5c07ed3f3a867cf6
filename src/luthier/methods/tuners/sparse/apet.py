"""APET: trains n single weights at random positions, drawn uniformly from all chosen matrices.

For studies of how much of fine-tuning is due to structure and how much to the number of trainable parameters:
set n to the number that another tuner trains and compare. Positions depend on the seed alone. Departs from
the paper: positions are in linear modules and embeddings (its biases and norms are tuner 'bitfit').
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners.sparse._sparse import Sparse
from luthier.registry import INTERNAL, tuner


@tuner(
    row="apet",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you study whether a tuner's structure matters: it trains the same number of parameters"
    " at random positions, as the baseline.",
    costs="one trainable number and one index for each position; the gradient of a chosen weight is"
    " computed whole before its entries are taken.",
    default_rate=5e-4,
)
class APET(Sparse):
    """Random positions, n in total."""

    # trainable entries, over all chosen modules; null: use density
    n: Annotated[int, Field(ge=1)] | None = None
    selection_seed: int = 0  # random seed of the positions
    # how many entries of each module; filled in when attached
    counts: Annotated[dict[str, int] | None, INTERNAL] = None

    def attach(self, model):
        from luthier.methods.tuners._peft.chosen import chosen_modules

        if self.counts is not None:
            return super().attach(model)
        sizes = {n: m.weight.numel() for n, m in chosen_modules(self, model).items()}
        total = sum(sizes.values())
        n = self.n or max(1, round(self.density * total))
        if n > total:
            raise RecipeError(
                f"tuner 'apet': n: {n} parameters, but the chosen modules have {total}; lower n"
            )
        fitted = replace(self, n=n, counts=spread_over(sizes, n, Clock(self.selection_seed).rng("apet")))
        names = [name for name, count in (fitted.counts or {}).items() if count]
        return Delta.attach(replace(fitted, target_modules=names, layers_to_transform=None), model)

    def at(self, name):
        """Counted over all chosen modules where luthier attached it; else `density` of this module."""
        seed = Clock(self.selection_seed).derive_seed("apet", name)
        if self.counts is not None:
            return replace(self, n=self.counts[name], selection_seed=seed)
        if self.n is not None:
            raise ValueError(
                "tuner 'apet' spreads n over all chosen modules before it is attached; leave n out and give"
                " density"
            )
        return replace(self, selection_seed=seed)

    def count(self, W):
        return super().count(W) if self.n is None else self.n

    def support(self, W):
        rng = torch.Generator().manual_seed(self.selection_seed)
        return draw(W.numel(), self.count(W), rng)


def draw(total: int, n: int, rng: torch.Generator) -> torch.Tensor:
    """[n] different numbers below total, all sets alike likely, in memory of n where n is small
    beside total.
    """
    if n > total // 4:
        return torch.randperm(total, generator=rng)[:n]
    chosen = torch.randint(total, (n,), generator=rng).unique()
    while len(chosen) < n:
        chosen = torch.cat([chosen, torch.randint(total, (n - len(chosen),), generator=rng)]).unique()
    return chosen


def spread_over(sizes: dict[str, int], n: int, rng: torch.Generator) -> dict[str, int]:
    """How many of n positions, drawn evenly from all of them, fall into each module."""
    places = draw(sum(sizes.values()), n, rng)
    ends = torch.tensor(list(sizes.values())).cumsum(0)
    counts = torch.bincount(torch.searchsorted(ends, places, right=True), minlength=len(sizes))
    return dict(zip(sizes, counts.tolist(), strict=True))
