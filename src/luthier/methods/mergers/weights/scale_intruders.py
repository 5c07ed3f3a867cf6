"""Scales the intruder dimensions of a tuned model: the causal test of evaluator `intruders`.

For each matrix inside the layers, those of the first k singular directions after tuning that resemble none of
the untuned matrix (largest cosine below `epsilon`) are multiplied by `factor`: W + (factor - 1) s_j u_j v_j'.
1 leaves the model bit for bit as it was, 0 takes the directions out. The study reports that factors a little
below 1 return some of what was forgotten and cost the task little.

`init_from: {merge: {name: scale_intruders, factor: 0.5}, of: [runs/full]}` with `tuner: full`, and
`objective: null` with evaluators to measure it. A LoRA run is exported first (`luthier export RUN --as
merged`), and the exported folder named in `of`. Departs: in GPT-2's matrices, which are stored transposed,
the directions of inputs are compared.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.mergers._base import BASE, Merger
from luthier.model.anatomy import layer_of
from luthier.model.weight_changes import intruding, scaled
from luthier.registry import Range, merger


@merger(
    paper="arXiv:2410.21228",
    row="intruder-dimensions",
    requires=[BASE],
    contract={"idempotent": "several runs are refused, and one is changed on purpose"},
    use_when="evaluator `intruders` counts some in a tuned model, and you ask what they do: scale them and"
    " measure again.",
    costs="a singular value decomposition of every matrix, before and after.",
    covers="the intervention with any factor, on tuned weights or on an exported adapter.",
    omits="in GPT-2's matrices, which are stored transposed, the directions of outputs, which evaluator"
    " `intruders` counts: there those of inputs are scaled.",
    tests=[
        "methods/mergers/weights/test_scale_intruders.py::test_a_planted_direction_alone_is_scaled",
        "methods/mergers/weights/test_scale_intruders.py::test_an_exported_adapter_is_scaled_in_a_run",
    ],
)
class ScaleIntruders(Merger):
    """One run in; the intruder dimensions of its matrices times `factor`."""

    # what their singular values are multiplied by
    factor: Annotated[float, Field(ge=0), Range(0.0, 1.3)] = 0.5
    k: Annotated[int, Field(gt=0)] = 10  # number of leading singular vectors of a matrix that are examined
    # a direction whose largest cosine with the old ones is below this is an intruder
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.5

    @torch.no_grad()
    def merge(self, several, base=None):
        names = self.alike(several)
        if len(several) != 1 or base is None:
            raise RecipeError(
                f"merger 'scale_intruders' takes one run and its base model, not {len(several)} runs"
            )
        matrices = [name for name in names if several[0][name].dim() == 2 and layer_of(name)]
        if not matrices:
            raise RecipeError(
                "merger 'scale_intruders' finds no matrices inside layers among the trained tensors; use it"
                " with `tuner: full`, on a run of it or on a model exported with --as merged"
            )
        out = {name: several[0][name].clone() for name in names}
        for name in matrices:
            start = torch.as_tensor(base[name]).to(out[name].device)
            if torch.equal(start, out[name]):
                continue
            places = intruding(start, out[name], self.k, self.epsilon)
            out[name] = scaled(out[name], places, self.factor)
        return out
