"""AutoPEFT: serial adapters, parallel adapters and a prefix together, described by one configuration vector
that a search can vary.

The vector: for each layer whether it has modules (`insert`, shared by the three kinds), and for the whole
network the width of the serial bottlenecks, that of the parallel ones and the length of the prefix; 0 removes
a kind, and with none left it is the frozen model. The number of trainable parameters follows from the vector
(`numbers`). `luthier search` varies all of it with goals `quality,parameters`; searchers `botorch` and
`bayes` are the paper's kind. A configuration that was found is used on another task with `luthier tune
found-1.yaml data=...`, or as the start of that task's own search with `--from`.

Departs: both adapters are at the last matrix of the feed-forward block, the serial one behind it and the
parallel one beside it, so that one reads the matrix's output and the other its input (the paper's parallel
adapter reads the input of the whole feed-forward block). The prefix is tuner `prefix` without its projection.
`up` starts at exactly zero.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, TunedModel
from luthier.methods.tuners._delta import Delta, oriented
from luthier.methods.tuners.adapters._bottleneck import Activation, pair, through
from luthier.methods.tuners.prompts._prefix import drawn, placed, taken, width
from luthier.model.anatomy import layer_of, pattern_of
from luthier.registry import Choices, tuner

POWERS = Choices(0, 1, 2, 4, 8, 16, 32, 64)  # sizes that a search goes over; wider networks may be worth more


@tuner(
    example={"num_virtual_tokens": 2, "parallel": 4, "serial": 4},
    paper="arXiv:2301.12132",
    row="autopeft",
    provides=[DISABLE_ADAPTER],
    contract={
        "starts_as_base": (
            "a prefix takes part in every attention from the first step on; without one the"
            " start is the base model"
        ),
        "modules_of_every_kind": (
            "its parts are placed at the key projections and behind the feed-forward block only"
        ),
    },
    use_when="you want `luthier search` to decide where adapters and prefixes go and how wide they"
    " are, rather than choosing a single adapter type.",
    costs="as the adapters and the prefix that are switched on; not mergeable, so inference stays"
    " slower by them.",
    covers="the configuration space of serial and parallel adapters and prefixes, its search, and the"
    " transfer of what is found.",
    omits="SAAS priors by sampling: they are fitted by maximum a posteriori.",
    tests=[
        "methods/tuners/mixture/test_autopeft.py::test_what_moves_is_what_the_vector_says",
        "methods/tuners/mixture/test_autopeft.py::test_a_search_of_vectors_covers_more_than_chance",
        "methods/tuners/mixture/test_autopeft.py::test_a_configuration_that_was_found_moves_to_another_task",
    ],
    default_rate=5e-4,
)
class AutoPEFT(Delta):
    """Three kinds of modules, and which layers have them."""

    kinds = (nn.Linear,)
    precise = False
    part = None  # of the module that these settings are for; off: its layer gains nothing
    over = ("layers",)  # what a search goes over besides the sizes

    # width of the bottleneck behind the feed-forward block; 0: none
    serial: Annotated[int, Field(ge=0), POWERS] = 16
    # width of the bottleneck beside its last matrix; 0: none
    parallel: Annotated[int, Field(ge=0), POWERS] = 16
    num_virtual_tokens: Annotated[int, Field(ge=0), POWERS] = 4  # keys and values before the text; 0: none
    # 1 for each layer that has modules, 0 for the others; not given: all have
    insert: list[Literal[0, 1]] | None = None
    non_linearity: Activation = "relu"  # nonlinearity of both bottlenecks
    # modules to which its parts are attached; auto: the keys and the last matrix of the feed-forward block
    target_modules: str | list[str] = "auto"

    def only(self, layers, of):
        return {"insert": [int(i in layers) for i in range(of)]}

    def at(self, name):
        place = layer_of(f"{name}.")
        settings = placed(self, name)
        if place is None:
            object.__setattr__(settings, "part", None)
        elif self.insert is not None and not self.insert[place[1]]:
            object.__setattr__(settings, "part", "off")
        return settings

    def numbers(self, model) -> int:
        """How many numbers move on a network: a formula of the vector and of shapes."""
        matrices = (
            (n, m)
            for n, m in model.named_modules()
            if isinstance(getattr(m, "weight", None), nn.Parameter) and m.weight.ndim == 2
        )
        return sum(self.at(n).size(*oriented(m).shape) for n, m in matrices)

    def size(self, out_: int, in_: int) -> int:
        """Of a matrix of this shape."""
        if self.part == "down":
            s, p = self.serial, self.parallel
            return (s > 0) * (s * (2 * out_ + 1) + out_) + (p > 0) * (p * (in_ + out_ + 1) + out_)
        return 2 * self.num_virtual_tokens * width(out_, in_, self.part) if self.part in ("k", "qkv") else 0

    def enter(self, model):
        if self.num_virtual_tokens:
            taken(model, "a prefix")

    def attach(self, model):
        layers = 1 + max(
            (place[1] for n, _ in model.named_modules() if (place := layer_of(f"{n}."))), default=-1
        )
        if self.insert is not None and len(self.insert) != layers:
            raise RecipeError(
                f"tuner 'autopeft': insert has {len(self.insert)} flags, but"
                f" {type(model).__name__} has {layers} layers"
            )
        sizes = {
            "serial": self.serial,
            "parallel": self.parallel,
            "num_virtual_tokens": self.num_virtual_tokens,
        }
        if not any(sizes.values()) or (self.insert is not None and not any(self.insert)):
            return FrozenModel(self, model.requires_grad_(False))
        fitted = self
        if self.target_modules == "auto":
            fitted = replace(self, target_modules=pattern_of(self.name, model, "down", "k", "qkv"))
        attached = super(AutoPEFT, fitted).attach(model)
        there = {slot.partition("_")[0] for s in attached.all_param_groups() for slot in s.params}
        for setting, slot in (("serial", "serial"), ("parallel", "parallel"), ("num_virtual_tokens", "keys")):
            if sizes[setting] and slot not in there:
                raise RecipeError(
                    f"tuner 'autopeft': {type(model).__name__} has no module for {setting}; set it to 0"
                )
        return attached

    def init(self, W):
        if self.part not in ("down", "k", "qkv", "off"):
            raise ValueError(
                "tuner 'autopeft' sits on key projections and on the last matrix of a feed-forward block, and"
                " a module of target_modules is neither"
            )
        out_, in_ = W.shape
        tensors = {}
        if self.part == "down":
            tensors |= pair(out_, self.serial, out_, "serial_") if self.serial else {}
            tensors |= pair(in_, self.parallel, out_, "parallel_") if self.parallel else {}
        elif self.part in ("k", "qkv") and self.num_virtual_tokens:
            tensors |= drawn(self.num_virtual_tokens, width(out_, in_, self.part))
        return tensors

    def prefix_kv(self, p):
        return (p.keys, p.values) if hasattr(p, "keys") else None

    def forward(self, x, y, p, layer):
        for name, h in (("serial_", y), ("parallel_", x)):
            if hasattr(p, f"{name}up"):
                own = [getattr(p, f"{name}{slot}") for slot in ("down", "down_bias", "up", "up_bias")]
                y = y + through(h.to(own[0].dtype), *own, self.non_linearity).to(y.dtype)
        return y


class FrozenModel(TunedModel):
    """The zero vector: the frozen model, without trainable parameters."""

    def all_param_groups(self):
        return []

    def off(self):
        return nullcontext()
