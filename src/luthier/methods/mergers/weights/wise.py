"""WiSE-FT: the straight line between the untuned model and a tuned one, theta_0 + alpha (theta - theta_0).

`init_from: {merge: {name: wise, alpha: 0.5}, of: [runs/full]}` with the tuner of that run. alpha 0 is the
untuned model and 1 the tuned one, both bit for bit; in between some of what tuning forgot returns. With a
list, each layer has a share of its own. For LoRA adapters, whose factors are multiplied, export the run as
`merged` first and interpolate under `tuner: full`.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.mergers._base import BASE, Merger
from luthier.methods.mergers.weights._layers import by_layer
from luthier.model.anatomy import layer_of
from luthier.registry import Range, merger


@merger(
    paper="arXiv:2109.01903",
    row="model-soups",
    requires=[BASE],
    contract={"idempotent": "several runs are refused, and one is moved towards the base on purpose"},
    use_when="full fine-tuning gained on its task and lost elsewhere: points between the untuned model and"
    " the tuned one often keep most of both.",
    costs="one pass over the tensors; inference costs one model.",
    covers="the line between the untuned model and a tuned one, with one share or one for each layer.",
    omits="shares that are learned for a line (plan `learned_soup` learns those of several runs).",
    tests=["methods/mergers/weights/test_wise.py::test_the_ends_are_both_models_and_the_middle_is_halfway"],
)
class Wise(Merger):
    """base + alpha * (tuned - base), of one run."""

    # share of the change that remains; a list: one for each layer, counted from the input
    alpha: Annotated[float, Field(ge=0), Range(0.0, 1.0)] | list[Annotated[float, Field(ge=0)]] = 0.5
    outside: Annotated[float, Field(ge=0)] = 1.0  # share of what is in no layer, where `alpha` is a list

    def tensor_by_tensor(self):
        return not isinstance(self.alpha, list)

    @torch.no_grad()
    def merge(self, several, base=None):
        names = self.alike(several)
        if len(several) != 1 or base is None:
            raise RecipeError(f"merger 'wise' takes one run and its base model, not {len(several)} runs")
        shares = self.shares(names)
        out = {}
        for name in names:
            share, tuned = shares[name], several[0][name]
            start = torch.as_tensor(base[name]).to(tuned.device)
            if share in (0, 1):
                out[name] = (tuned if share else start).clone()
            else:
                out[name] = torch.lerp(start.double(), tuned.double(), share).to(tuned.dtype)
        return out

    def shares(self, names: list[str]) -> dict[str, float]:
        """The share of each tensor. Raises RecipeError where a list does not fit the layers."""
        if not isinstance(self.alpha, list):
            return dict.fromkeys(names, self.alpha)
        shares = by_layer(self.name, names, self.alpha, f"alpha has {len(self.alpha)} shares")
        return {name: shares.get(layer_of(name), self.outside) for name in names}
