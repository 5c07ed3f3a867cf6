"""S2FT: trains a few feed-forward channels and attention heads of every layer, as one small dense matrix per
weight.

Weights that read a channel (down, o) are trained in columns: y + x[.., chosen] S'. Weights that write one
(up, gate, v) are trained in rows: y[.., chosen] += x S'. Only S has a gradient, and only the chosen inputs
are stored for it. Heads and channels are drawn once per layer, so up, gate and down use the same, and v's
heads are those whose queries o reads (with grouped queries, too). They are chosen at random (S2FT-R, the
paper's default), or by `selection`: the norm of the weights that a channel or head is made of (its rows of
up, gate and v, its columns of down and o), the norm of what down and o read there on the first rows, or the
norm of the gradient of -log p on these weights; the largest of them, or with `extreme: smallest` the least.
Departs from the paper: chosen columns are gathered in place and nothing is permuted, which computes the same,
leaves the model unchanged and allows adapters with different channels to be added. Heads are compared by the
groups that share a key and value.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta, frozen
from luthier.methods.tuners.subset.s2ft.parts import READS, WRITES
from luthier.model.anatomy import kind_of, layer_of, part_of
from luthier.model.linear import linear_modules
from luthier.registry import INTERNAL, Range, family, tuner

if TYPE_CHECKING:
    from luthier.model.network import Network

Share = Annotated[float, Field(ge=0, le=1)]


@tuner(
    paper="arXiv:2412.06289",
    row="s2ft",
    provides=[DISABLE_ADAPTER, MERGE],
    contract={
        "modules_of_every_kind": (
            "only down, up, gate, o and v have channels or heads to choose, each with its own ratio"
        )
    },
    use_when="you want sparse fine-tuning at LoRA's memory with dense arithmetic: a few heads and"
    " channels of each layer are trained as small dense matrices.",
    costs="gradients and optimizer state of the chosen channels; only their inputs are kept for the"
    " backward pass.",
    starting_rate="start with that of `lora`.",
    default_rate=2e-4,
    covers="it computes what the leading blocks of a permuted model compute, with grouped queries; all "
    "of down is full tuning of down; nothing else moves, and adapters of other channels add; what"
    " is kept for backward grows with the chosen channels; weight, activation and gradient "
    "selections are the largest norms.",
    omits="serving of many adapters by scatter-add (merge one, or load several with PEFT).",
    tests=[
        "methods/tuners/subset/test_s2ft.py::test_s2ft_is_the_leading_block_of_a_permuted_model",
        "methods/tuners/subset/test_s2ft.py::test_s2ft_with_all_of_down_is_full_tuning_of_down",
        "methods/tuners/subset/test_s2ft.py::test_s2ft_leaves_the_rest_and_composes",
        "methods/tuners/subset/test_s2ft.py::test_s2ft_keeps_the_chosen_activations_only",
        "methods/tuners/subset/test_s2ft.py::test_s2ft_selects_by_weights_activations_and_gradients",
    ],
)
class S2FT(Delta):
    """Structured sparse fine-tuning."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear,)

    # share of the channels whose columns of down are trained
    d_ratio: Annotated[Share, Range(0.01, 0.2, log=True)] = 0.03
    u_ratio: Share = 0.0  # share of the channels whose rows of up are trained
    g_ratio: Share = 0.0  # share of the channels whose rows of gate are trained
    o_ratio: Share = 0.0  # share of the heads whose columns of o are trained
    v_ratio: Share = 0.0  # share of the key-value heads whose rows of v are trained
    # by what heads and channels are chosen; activation and gradient read the first init_rows rows
    selection: Literal["random", "weight", "activation", "gradient"] = "random"
    extreme: Literal["largest", "smallest"] = "largest"  # which of them, by the norm that selection names
    init_rows: Annotated[int, Field(ge=1)] = 64  # rows for activation and gradient
    selection_seed: int = 0  # random seed of the choice of heads and channels
    num_attention_heads: Annotated[int | None, INTERNAL] = None  # of the network; filled in when attached
    num_key_value_heads: Annotated[int | None, INTERNAL] = None  # of the network; filled in when attached

    def __post_init__(self):
        if not any(getattr(self, r) for r in (*READS.values(), *WRITES.values())):
            raise RecipeError("one of d_ratio, u_ratio, g_ratio, o_ratio, v_ratio must be above 0")

    def attach(self, model):
        from luthier.methods.tuners._peft.chosen import chosen_modules
        from luthier.methods.tuners.subset.s2ft.tuned import S2FTModel

        text = model.config.get_text_config()
        heads = getattr(text, "num_attention_heads", None)
        if heads is None:
            raise RecipeError(f"tuner 's2ft': {type(model).__name__} has no attention heads to choose from")
        fitted = replace(
            self,
            num_attention_heads=heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        )
        if self.target_modules == "all-linear":
            there = [n for n in chosen_modules(self, model, required=True) if fitted.ratio(n)]
            self.check_parts(model, there)
            fitted = replace(fitted, target_modules=there, layers_to_transform=None)
        return S2FTModel(fitted, model)

    def check_parts(self, model: Network, names: list[str]) -> None:
        """Raises RecipeError where a ratio has no module of its part among these."""
        chosen, present = set(map(part_of, names)), set(map(part_of, linear_modules(model)))
        for part, ratio in {**READS, **WRITES}.items():
            if not getattr(self, ratio) or part in chosen:
                continue
            if part in present:
                cause = f"the settings leave out every module that {ratio} is for"
            else:
                cause = f"{type(model).__name__} has no separate linear module for {ratio}"
            raise RecipeError(f"tuner 's2ft': {cause}; set its ratio to 0, and another above 0")

    def ratio(self, name: str) -> float:
        """The share of a module that moves."""
        setting = {**READS, **WRITES}.get(part_of(name) or "")
        return getattr(self, setting) if setting else 0.0

    def at(self, name):
        if not self.ratio(name):
            raise RecipeError(
                f"tuner 's2ft': {name} is not one of down, up, gate, o and v, or its ratio is 0"
            )
        heads = 0
        if kind_of(name) == "attention":
            heads = self.num_attention_heads if part_of(name) == "o" else self.num_key_value_heads
        drawn = Clock(self.selection_seed).derive_seed("s2ft", layer_of(f"{name}."), kind_of(name))
        side = "in" if part_of(name) in READS else "out"
        return WeightSlice(
            ratio=self.ratio(name),
            side=side,
            heads=heads or 0,
            groups=self.num_key_value_heads or 0,
            drawn=drawn,
        )

    def init(self, W):
        raise RecipeError("tuner 's2ft' must know which module a weight is of: `at(name)`")


@family
class WeightSlice(Delta):
    """The trainable part of one weight."""

    name: ClassVar[str] = "s2ft"
    provides: ClassVar[frozenset[str]] = frozenset({DISABLE_ADAPTER, MERGE})
    kinds: ClassVar[tuple[type, ...]] = (nn.Linear,)
    precise: ClassVar[bool] = False

    ratio: float  # of its heads or channels
    side: Literal["in", "out"]  # columns or rows
    heads: int  # that the side is made of; 0: it is made of channels
    groups: int  # of heads, drawn together
    drawn: int  # by this seed

    def chosen(self, n: int, order: torch.Tensor | None = None) -> torch.Tensor:
        """[k] the columns or rows of n that move, ascending. order: the channels, or groups of heads, from
        the first to be chosen to the last; None: at random.
        """
        units = self.heads or n
        if order is None:
            rng = torch.Generator().manual_seed(self.drawn)
            order = torch.randperm(self.groups if self.heads else n, generator=rng)
        if self.heads:
            order = torch.arange(units).view(self.groups, -1)[order].flatten()
        picked = order[: max(1, round(self.ratio * units))].sort().values
        return (picked[:, None] * (n // units) + torch.arange(n // units)).flatten()

    def init(self, W):
        n = W.shape[1] if self.side == "in" else W.shape[0]
        at = self.chosen(n)
        shape = (W.shape[0], len(at)) if self.side == "in" else (len(at), W.shape[1])
        return {"indices": frozen(at.int()), "size": frozen(torch.tensor(n)), "S": torch.zeros(shape)}

    def weight(self, W, p):
        return W.index_add(1 if self.side == "in" else 0, p.indices, p.S.to(W.dtype))

    def forward(self, x, y, p, layer):
        S = p.S.to(x.dtype)
        if self.side == "out":
            return y.index_add(-1, p.indices, x @ S.T)
        read = x.reshape(-1, x.shape[-1]).index_select(1, p.indices)
        return torch.addmm(y.reshape(-1, y.shape[-1]), read, S.T).view(y.shape)

    def factors(self, p):
        E = torch.eye(int(p.size), device=p.S.device)[p.indices]
        return (E, p.S) if self.side == "in" else (p.S, E.T)
