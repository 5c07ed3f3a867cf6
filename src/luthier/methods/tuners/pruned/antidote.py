"""Antidote: sets those weights of a tuned model to zero that matter most for harmful answers.

Repairs a model whose safety was lost in fine-tuning, harmful rows among the data or not. The run reads
harmful pairs and takes no step (`max_steps: 0`); `model` is the tuned model. Importance is Wanda's score,
|w| times the norm of its input over the tokens of these rows, compared within each output row; the first
floor(ratio * inputs) become zero. Departs from the paper: matrices that are measured in the same pass over
the rows (all, in a small model) use the activations of the whole model, where the paper propagates those of
pruned layers; of a model tuned with LoRA the merged weights are pruned.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.tuners._base import MERGE, Tuner
from luthier.methods.tuners.pruned.pruned import PrunedModel
from luthier.model.statistics import statistics
from luthier.registry import Range, tuner


@tuner(
    example={"init_rows": 2},
    paper="arXiv:2408.09600",
    row="antidote",
    provides=[MERGE],
    use_when="fine-tuning has made a model answer harmful requests and you have pairs of such requests and"
    " answers; with `max_steps: 0`, as steps would learn these pairs.",
    costs="one pass over `init_rows` harmful rows; nothing is trained.",
    default_rate=2e-5,
    covers="Wanda's score over harmful rows, the first share of each output row set to zero, matrices of"
    " attention and MLP alone.",
    omits="calibration layer by layer through pruned layers; pruning of LoRA's own matrices; the harmful"
    " score by a moderation model; a language model poisoned and repaired (shown for a matrix only).",
    tests=[
        "methods/tuners/pruned/test_antidote.py::test_zeros_are_the_first_of_each_row_by_score",
        "methods/tuners/pruned/test_antidote.py::test_a_ratio_of_zero_changes_nothing",
        "methods/tuners/pruned/test_antidote.py::test_what_reads_harmful_rows_suffers_more_than_by_chance",
    ],
)
class Antidote(Tuner):
    """Of each row of a matrix, what matters most for harmful answers becomes zero."""

    reads_rows: ClassVar[bool] = True

    ratio: Annotated[float, Field(ge=0, lt=1), Range(0.05, 0.3)] = 0.1  # share of each row that becomes zero
    init_rows: Annotated[int, Field(ge=1)] = 1000  # harmful rows that are read

    def attach(self, model):
        return Repaired(self, model)

    def mask(self, W: Tensor, norms: Tensor) -> Tensor:
        """[out, in] weights, [in] norms of inputs -> which entries stay."""
        harmful = (W.abs() * norms).argsort(dim=1, descending=True, stable=True)
        harmful = harmful[:, : math.floor(self.ratio * W.shape[1] + 1e-9)]
        return torch.ones_like(W, dtype=torch.bool).scatter_(1, harmful, False)


class Repaired(PrunedModel):
    """The masks belong to the state."""

    @torch.no_grad()
    def initialize(self, rows, roles):
        names = [name.removesuffix(".weight") for name in self.matrices]
        layers = {name: self.model.get_submodule(name) for name in names}
        for layer, C in statistics("covariance", layers, rows[: self.settings.init_rows], roles):
            name = f"{layer}.weight"
            self.prune(name, self.settings.mask(self.weight(name), C.diagonal().sqrt()))
        self.after_step(roles.clock)
