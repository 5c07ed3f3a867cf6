"""LLaVA-MoLE: every feed-forward block has several low-rank experts, and each token goes through one of them.

A linear router reads what the block reads; the likeliest expert of a token is taken at all matrices of the
block, y = W x + (alpha / r) B_k A_k x. Attention has ordinary LoRA. The router learns from a loss that
spreads tokens over experts: sum over experts of (share of tokens) * (mean probability), averaged over the
blocks. Its gradient is that of the whole global batch, however it is accumulated. `scaled: true` multiplies
the change by the probability of its expert, as Switch does, and the router learns from the task, too.

Departs: text models (the paper's also trains a projector of images); tokens count where they are read, so a
prompt that several completions share counts once, and padding counts where a layout pads. The loss of balance
reaches the router alone, not the layers below.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners.mixture._routed import low_rank
from luthier.methods.tuners.prompts._prefix import placed
from luthier.model.anatomy import part_of
from luthier.model.linear import linear_modules
from luthier.registry import INTERNAL, Range, tuner

BLOCK = ("gate", "gate_up", "up", "down")  # matrices of a feed-forward block, in the order they are read in


@tuner(
    example={"experts": 2},
    paper="arXiv:2401.16160",
    row="llava-mole",
    provides=[DISABLE_ADAPTER],
    contract={"modules_of_every_kind": "experts need the matrix that reads a feed-forward block's input"},
    use_when="data of different domains disturb each other under one LoRA: each token chooses one of several"
    " experts at feed-forward blocks.",
    costs="`experts` times the numbers of LoRA at feed-forward blocks, little more time than LoRA; not"
    " mergeable.",
    starting_rate="start with that of `lora`.",
    default_rate=2e-4,
    covers="one router a block for its two or three matrices, hard choice of one expert, the loss of balance"
    " over the global batch, scaled and unscaled forms, LoRA at attention; one expert is LoRA; text models.",
    omits="images and the projector that reads them, dropout, and the paper's benchmarks.",
    tests=[
        "methods/tuners/mixture/test_llava_mole.py::test_one_expert_is_lora",
        "methods/tuners/mixture/test_llava_mole.py::test_each_token_is_read_by_its_expert_at_all_matrices",
        "methods/tuners/mixture/test_llava_mole.py::test_the_gradient_of_balance_is_that_of_its_formula",
        "methods/tuners/mixture/test_llava_mole.py::test_two_domains_in_conflict_go_to_experts_of_their_own",
    ],
)
class LlavaMole(Delta):
    """Low-rank experts at feed-forward blocks, one for each token, and LoRA elsewhere."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear,)

    experts: Annotated[int, Field(ge=1), Range(2, 8)] = 3  # experts of each feed-forward block
    r: Annotated[int, Field(ge=1), Range(2, 64, log=True)] = 32  # rank of each, and of LoRA at attention
    alpha: Annotated[float, Field(gt=0)] = 16.0  # scale of a change, before division by r
    scaled: bool = False  # multiply a change by the probability of its expert
    # weight of the loss of balance
    balance: Annotated[float, Field(ge=0), Range(1e-3, 1e-1, log=True)] = 1e-2
    # the matrix of a feed-forward block that is read first; filled in when it is attached
    router_part: Annotated[str | None, INTERNAL] = None

    block: ClassVar[tuple[str, ...]] = BLOCK
    part: ClassVar[str | None] = None  # of the module that these settings are for

    def attach(self, model):
        from luthier.methods.tuners.mixture._llava_mole_model import LlavaMoleModel

        parts = {part_of(name) for name in linear_modules(model)}
        first = next((part for part in BLOCK[:3] if part in parts), None)
        if first is None:
            raise RecipeError(f"tuner 'llava_mole' finds no feed-forward block in {type(model).__name__}")
        return LlavaMoleModel(replace(self, router_part=first), model)

    def enter(self, model):
        from luthier.methods.tuners.mixture._llava_mole_model import route

        route(self, model)

    def at(self, name):
        return placed(self, name)

    def init(self, W):
        many = self.experts if self.part in BLOCK else 1
        A = torch.empty(many, self.r, W.shape[1])
        for expert in A:
            nn.init.kaiming_uniform_(expert, a=5**0.5)
        tensors: dict[str, Any] = {"A": A, "B": torch.zeros(many, W.shape[0], self.r)}
        if self.part == self.router_part:
            tensors["router"] = torch.randn(many, W.shape[1]) * 0.02
        return tensors

    def forward(self, x, y, p, layer):
        if self.part not in BLOCK:
            return y + self.alpha / self.r * (x @ p.A[0].T @ p.B[0].T)
        routing: Any = layer.routing
        if self.part == self.router_part:
            routing.read(x, p.router, layer.training)
        change = low_rank(x, routing.choice, lambda i: (p.A[i], p.B[i]), y.shape[-1])
        if self.scaled:
            change = change * routing.probability
        if self.part == "down":
            routing.clear()
        return y + self.alpha / self.r * change

    def weight(self, W, p):
        raise NotImplementedError("tuner 'llava_mole' has a weight for each expert")
