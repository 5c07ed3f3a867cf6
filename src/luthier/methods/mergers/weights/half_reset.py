"""Half-reset: after full fine-tuning, resets a random half of the weights to the base model's.

HFT's observation that led to half fine-tuning: much of what was forgotten returns. The half is drawn as in
tuner 'hft'. `init_from: {merge: half_reset, of: [runs/full]}`.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.mergers._base import BASE, Merger
from luthier.model.anatomy import layer_of
from luthier.registry import merger


@merger(
    paper="arXiv:2404.18466",
    row="hft",
    requires=[BASE],
    contract={"idempotent": "several runs are refused, and one is changed on purpose"},
    use_when="full fine-tuning has ended and forgot too much.",
    costs="one pass over the tensors.",
)
class HalfReset(Merger):
    """One run in; about `ratio` of its layers' weights are reset to the base's."""

    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5  # share of the layers' weights that is reset
    selection_seed: int = 0  # random seed of the choice of weights

    def merge(self, several, base=None):
        from luthier.methods.tuners.subset.hft import half

        tensors = self.alike(several)
        if len(several) != 1 or base is None:
            raise RecipeError(
                f"merger 'half_reset' takes one run and its base model, not {len(several)} runs"
            )
        names = {n.removesuffix(".weight"): n for n in tensors}  # parameter -> its tensor's name
        sizes = {n: several[0][k].numel() for n, k in names.items() if layer_of(n)}
        reset = half(sizes, self.ratio, Clock(self.selection_seed).rng("half_reset"))
        if not reset:
            raise RecipeError(
                "merger 'half_reset' finds no layers among the trained tensors; use it with"
                " full fine-tuning (full, hft)"
            )
        return {
            k: torch.as_tensor(base[k] if n in reset else several[0][k]).clone() for n, k in names.items()
        }
