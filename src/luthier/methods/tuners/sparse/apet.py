"""APET: trains n single weights at random positions, drawn uniformly from all chosen matrices.

For studies of how much of fine-tuning is due to structure and how much to the number of trainable parameters:
set n to the number that another tuner trains and compare, as plan `apet` does. Positions depend on the seed
alone. `of: biases` draws them from the biases of the chosen modules, so with all of these it trains what
BitFit does there, and `of: all` from both. Departs from the paper: norms are left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners.sparse._biased import BiasedEntries
from luthier.methods.tuners.sparse._sparse import Sparse
from luthier.registry import INTERNAL, family, tuner


@tuner(
    row="apet",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you study whether a tuner's structure matters: it trains the same number of parameters"
    " at random positions, as the baseline.",
    costs="one trainable number and one index for each position; the gradient of a chosen weight is"
    " computed whole before its entries are taken.",
    default_rate=5e-4,
    covers="exactly n entries change, and only the seed decides which; at the positions of BitFit it is "
    "BitFit, step for step.",
    omits="positions in norms and embeddings.",
    tests=[
        "methods/tuners/sparse/test_apet.py::test_apet_moves_as_many_as_it_says",
        "methods/tuners/sparse/test_apet.py::test_apet_at_all_biases_is_bitfit",
    ],
)
class APET(Sparse):
    """Random positions, n in total."""

    # trainable entries, over all chosen modules; null: use density
    n: Annotated[int, Field(ge=1)] | None = None
    of: Literal["weights", "biases", "all"] = "weights"  # of what in the chosen modules
    selection_seed: int = 0  # random seed of the positions
    # how many entries of each module; filled in when attached
    counts: Annotated[dict[str, int] | None, INTERNAL] = None

    def attach(self, model):
        from luthier.methods.tuners._peft.chosen import chosen_modules

        if self.counts is not None:
            return super().attach(model)
        modules, sizes = chosen_modules(self, model, required=True), {}
        for name, module in modules.items():
            if self.of != "biases":
                sizes[name] = module.weight.numel()
            if self.of != "weights" and getattr(module, "bias", None) is not None:
                sizes[f"{name}.bias"] = module.bias.numel()
        if not sizes:
            raise RecipeError(f"tuner 'apet': {type(model).__name__} has no biases in the chosen modules")
        total = sum(sizes.values())
        n = self.n or max(1, round(self.density * total))
        if n > total:
            raise RecipeError(
                f"tuner 'apet': n: {n} parameters, but the chosen modules have {total}; lower n"
            )
        fitted = replace(self, n=n, counts=spread_over(sizes, n, Clock(self.selection_seed).rng("apet")))
        reached = {key.removesuffix(".bias") for key, count in (fitted.counts or {}).items() if count}
        names = [name for name in modules if name in reached]
        attached = Delta.attach(replace(fitted, target_modules=names, layers_to_transform=None), model)
        if self.target_modules == "all-linear":
            attached.warnings += attached.experts_left_out("all-linear")
        return attached

    def at(self, name):
        """Counted over all chosen modules where luthier attached it; else `density` of this module."""
        seed = Clock(self.selection_seed).derive_seed("apet", name)
        if self.counts is None and self.n is not None:
            raise ValueError(
                "tuner 'apet' spreads n over all chosen modules before it is attached; leave n out and give"
                " density"
            )
        if self.counts is None:
            return replace(self, selection_seed=seed)
        weight, bias = self.counts.get(name, 0), self.counts.get(f"{name}.bias", 0)
        if not bias:
            return replace(self, n=weight, selection_seed=seed)
        return WithBias(n=weight, biases=bias, seed=seed)

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


@family
class WithBias(BiasedEntries):
    """Random entries of a weight, none perhaps, and of its bias."""

    name: ClassVar[str] = "apet"
    provides: ClassVar[frozenset[str]] = frozenset({DISABLE_ADAPTER, MERGE})

    seed: int  # random seed of both

    def support(self, W):
        return draw(W.numel(), self.n or 0, torch.Generator().manual_seed(self.seed))

    def bias_places(self, width):
        return draw(width, self.biases, torch.Generator().manual_seed(self.seed + 1))
