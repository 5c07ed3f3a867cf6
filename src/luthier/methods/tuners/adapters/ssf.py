"""SSF: scales and shifts the output of every chosen module, y * scale + shift, with one pair of numbers per
channel.

Folds into W and b. On networks without biases the merged model gets them where its config has a place for
them (Llama's `attention_bias` and `mlp_bias`), and is refused where it has none. Departs from the paper:
scale starts at exactly 1 and shift at 0 (the paper draws them from N(1, 0.02) and N(0, 0.02)), so that
training starts at the base model. Modules are the linear ones unless named; `norms: true` adds the norms, as
in the paper. An RMSNorm has no shift to fold into: there the scale alone is trained.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from torch import nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta, RMSNorm, norms_of
from luthier.registry import INTERNAL, tuner


@tuner(
    paper="arXiv:2210.08823",
    row="ssf",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you want a tiny tuner that merges away completely: a scale and a shift for each output"
    " channel.",
    costs="two trainable numbers per output channel; merged, inference costs nothing more.",
    starting_rate="several times LoRA's: its recipe here takes 0.01 where that of `lora` has 0.002.",
    default_rate=1e-3,
    covers="merged it is plain weights and biases, LayerNorms included; two numbers per channel; "
    "networks without biases gain them where their config has a place; with `norms` also every "
    "RMSNorm, by its scale; with the shift at zero it is IA3's scale of the same outputs; it "
    "solves a task of shifted features that a head alone does not.",
    omits="shifts after RMSNorms; the first draw around one and zero; convolutions and vision networks.",
    tests=[
        "methods/tuners/adapters/test_ssf.py::test_ssf_folds_into_weight_and_bias",
        "methods/tuners/adapters/test_ssf.py::test_on_a_network_without_biases_the_merged_model_has_them",
        "methods/tuners/adapters/test_ssf.py::test_ssf_scales_rms_norms_and_folds_into_them",
        "methods/tuners/adapters/test_ssf.py::test_ssf_without_its_shift_is_ia3",
        "methods/tuners/adapters/test_ssf.py::test_ssf_solves_what_a_head_alone_does_not",
    ],
)
class SSF(Delta):
    """Scale and shift features: two trainable numbers per output channel."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear, nn.LayerNorm, RMSNorm)

    norms: bool = False  # also every norm of the chosen layers; RMSNorms are only scaled
    # the network's RMSNorms, which have no shift; filled in when it is attached
    scale_only: Annotated[list[str] | None, INTERNAL] = None

    def attach(self, model):
        from luthier.methods.tuners._peft.chosen import chosen_modules
        from luthier.methods.tuners._peft.targets import as_list

        rms = {name: module for name, module in model.named_modules() if isinstance(module, RMSNorm)}
        fitted = replace(self, scale_only=sorted(rms))
        names = list(chosen_modules(self, model))
        if self.norms:
            names += norms_of(model, as_list(self.layers_to_transform))
            fitted = replace(fitted, target_modules=names, layers_to_transform=None)
        for module in {type(rms[name]): rms[name] for name in names if name in rms}.values():
            self.check_proportional(module)
        return super(SSF, fitted).attach(model)

    @torch.no_grad()
    def check_proportional(self, norm: Any) -> None:
        """Raises RecipeError for a norm whose output is not in proportion to its weight, as Gemma's."""
        doubled = copy.deepcopy(norm)
        doubled.weight.mul_(2)
        x = torch.randn(1, *norm.weight.shape, generator=torch.Generator().manual_seed(0)).to(norm.weight)
        if not torch.allclose(doubled(x), 2 * norm(x), rtol=1e-2, atol=1e-3):
            raise RecipeError(
                f"tuner 'ssf': the output of {type(norm).__name__} is not proportional to its weight, so no"
                " scale folds into it; leave norms out"
            )

    def at(self, name):
        return replace(self, scale_only=[""] if name in (self.scale_only or ()) else None)

    def init(self, W):
        tensors = {"scale": torch.ones(W.shape[0])}
        if not self.scale_only:
            tensors["shift"] = torch.zeros(W.shape[0])
        return tensors

    def weight(self, W, p):
        return p.scale[:, None] * W if W.ndim == 2 else p.scale * W

    def bias(self, b, p):
        if self.scale_only:
            return b
        return p.shift if b is None else p.scale * b + p.shift

    def forward(self, x, y, p, layer):
        if self.scale_only:
            return y * p.scale
        return y * p.scale + p.shift
