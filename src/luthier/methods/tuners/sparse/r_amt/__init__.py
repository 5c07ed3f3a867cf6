"""R-AMT: freezes the weights and trains a binary mask over them, W * [M > t], with one number M per weight.

The gradient passes the threshold unchanged (straight-through: dL/dM is that of the mask's entry). The adapter
stores bits, an eighth of a byte per weight; M itself is in checkpoints. When merged, masked weights are zero.
Its regulariser, gradient dropout, is estimator 'gradient_dropout' with objective `sft + kl`. Departs from the
paper: for language models the default is the attention of every layer, where the paper masks CLIP's image
encoder.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import nn

from luthier.errors import RecipeError
from luthier.methods.estimators._base import GRADIENT
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta, frozen
from luthier.methods.tuners.sparse.r_amt.bits import pack, unpack
from luthier.model.anatomy import kind_of, part_of
from luthier.registry import tuner


@tuner(
    requires=[GRADIENT],  # values of the loss do not change until an entry passes the threshold
    paper="arXiv:2307.15049",
    row="r-amt",
    provides=[DISABLE_ADAPTER, MERGE],
    contract={"accumulation": "a threshold decides of each weight, and rounding of those that lie on it"},
    use_when="a task's copy is to be bits: it learns which weights to switch off and changes none of them.",
    costs="one trainable number for each masked weight while training; an eighth of a byte a weight"
    " when saved.",
    default_rate=1e-3,
    covers="masks of the attention's matrices, kept as bits.",
    omits="CLIP and images.",
    tests=[
        "methods/tuners/sparse/test_r_amt.py::test_r_amt_masks",
        "methods/tuners/sparse/test_r_amt.py::test_r_amt_is_kept_as_bits",
    ],
)
class RAMT(Delta):
    """Regularized mask tuning."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear,)

    # which matrices of the layers, unless target_modules names modules
    where: Literal["attention", "mlp", "all"] = "attention"
    mask_init: float = 1e-2  # initial M, above the threshold: nothing is masked
    threshold: float = 5e-3  # a weight is masked if its M is not above this

    def __post_init__(self):
        if self.mask_init <= self.threshold:
            raise RecipeError(
                "mask_init must be above threshold, otherwise training does not start at the base model"
            )

    def attach(self, model):
        from luthier.methods.tuners._peft.chosen import chosen_modules
        from luthier.methods.tuners.sparse.r_amt.tuned import MaskTunedModel

        kinds = {"attention": {"attention"}, "mlp": {"feed-forward"}, "all": {"attention", "feed-forward"}}[
            self.where
        ]
        fitted = self
        if self.target_modules == "all-linear":
            chosen = chosen_modules(self, model, required=True)
            there = [n for n in chosen if part_of(n) and kind_of(n) in kinds]
            if not there:
                raise RecipeError(
                    f"tuner 'r_amt' finds no {self.where} matrices in {type(model).__name__};"
                    " name them in target_modules"
                )
            fitted = replace(self, target_modules=there, layers_to_transform=None)
        attached = MaskTunedModel(fitted, model)
        if self.target_modules == "all-linear" and self.where != "attention":
            attached.warnings += attached.experts_left_out(f"where: {self.where}")
        return attached

    def init(self, W):
        ones = torch.ones(W.shape, dtype=torch.bool)
        return {"M": torch.full(W.shape, self.mask_init), "bits": frozen(pack(ones))}

    def weight(self, W, p):
        mask = unpack(p.bits, W.shape)
        if p.M.is_meta:  # loaded by PEFT without a first filling: the bits say all
            return W * mask.to(W.dtype)
        return W * ((mask & (p.M > self.threshold)).to(p.M.dtype) + (p.M - p.M.detach())).to(W.dtype)
