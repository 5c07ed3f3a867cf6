"""APT: prompt tokens of every attention, without a place in the sequence: what they add is computed beside
the attention and put to its output.

Attention over [prompts; text] is (1 - a) * attention over the text + a * attention over the prompts. APT
gives the second part to itself: with the prompts P [n, width] of a layer and their keys P + (P U) V, of low
rank and V zero at first, a token x has s = relu(x keys'), and the output h of the attention becomes
(h + max(s) * s P) * exp(g). max(s) has no gradient, and g starts at 0. It costs 2 n width a token, and the
sequence is as long as without prompts.

Departs: text models; x is what the attention's first matrix reads, which in networks with norms before their
sublayers lies behind the norm, as in the authors' code; no dropout of s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners.adapters._sublayer import FIRST, hand_over, sublayer_input
from luthier.model.anatomy import part_of, pattern_of
from luthier.registry import Range, tuner


@tuner(
    example={"num_virtual_tokens": 2},
    paper="arXiv:2306.15706",
    row="apt-approx-prompt",
    provides=[DISABLE_ADAPTER],
    contract={
        "starts_as_base": "prompts change the output of every attention from the first step on",
        "modules_of_every_kind": "it is attached to the last matrices of sublayers and to no other module",
    },
    use_when="prompts in every layer are what you want and their cost is not: sequences stay as long as they"
    " are.",
    costs="twice `num_virtual_tokens` times the width for each token and layer; not mergeable.",
    starting_rate="the paper takes about 1e-4.",
    default_rate=1e-4,
    covers="prompts of each layer, keys of low rank, their weight and gain, in the authors' form, on text"
    " models; the split of attention that it replaces is shown as an identity.",
    omits="vision-language models, diffusion, cross-modal layers, and the paper's measurements.",
    tests=[
        "methods/tuners/prompts/test_apt.py::test_it_is_the_formula",
        "methods/tuners/prompts/test_apt.py::test_without_prompts_it_is_the_base",
        "methods/tuners/prompts/test_apt.py::test_cost_grows_linearly_and_sequences_stay",
    ],
)
class APT(Delta):
    """Prompts beside attention, approximated."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear,)

    num_virtual_tokens: Annotated[int, Field(ge=1), Range(8, 256, log=True)] = 200  # prompts of each layer
    r: Annotated[int, Field(ge=1), Range(1, 16)] = 4  # rank of what keys add to the prompts
    # last matrices of sublayers; auto: those of attention
    target_modules: str | list[str] = "auto"

    def attach(self, model):
        if self.target_modules != "auto":
            return super().attach(model)
        return super(APT, replace(self, target_modules=pattern_of(self.name, model, "o"))).attach(model)

    def enter(self, model):
        from luthier.methods.tuners._peft.chosen import chosen_modules

        for name in chosen_modules(self, model):
            if part_of(name) not in FIRST:
                raise ValueError(f"tuner 'apt' sits on the last matrices of sublayers, and {name} is none")
        hand_over(self, model)

    def init(self, W):
        width = W.shape[0]
        return {
            "P": torch.randn(self.num_virtual_tokens, width) * 0.02,
            "U": torch.randn(width, self.r),
            "V": torch.zeros(self.r, width),
            "gain": torch.zeros(1),
        }

    def forward(self, x, y, p, layer):
        h = sublayer_input(self, layer).to(y.dtype)
        s = torch.relu(h @ (p.P + p.P @ p.U @ p.V).T)
        weight = s.amax(-1, keepdim=True).detach()
        return (y + weight * (s @ p.P)) * p.gain.exp()

    def weight(self, W, p):
        raise NotImplementedError("tuner 'apt' computes beside the weights and has no tuned weight")
