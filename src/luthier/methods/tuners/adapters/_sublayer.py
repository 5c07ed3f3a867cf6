"""Adapters of whole sublayers: which sublayer they change, what they read, and how the change is put in.

They sit on the last matrix of a sublayer. A parallel adapter reads what the sublayer's first matrix reads,
which a hook on that matrix hands over.
"""

from __future__ import annotations

from os.path import commonprefix
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners.adapters._bottleneck import NARROWER, Activation, Bottleneck, through
from luthier.methods.tuners.prompts._prefix import placed
from luthier.model.anatomy import layer_of, part_of
from luthier.model.linear import linear_modules
from luthier.registry import family

if TYPE_CHECKING:
    from luthier.model.network import Network

# sublayers -> what their last matrices are
ENDS = {"attention": ("o",), "feed_forward": ("down",), "both": ("o", "down")}
FIRST = {"o": ("q", "qkv"), "down": ("up", "gate", "gate_up")}  # last matrix -> the first ones


class Passed:
    """A tensor that a copy of the network does not take along."""

    def __init__(self, tensor: Tensor | None):
        self.tensor = tensor

    def __deepcopy__(self, memo: Any) -> Passed:
        return Passed(None)


class HandOver:
    """A hook on the first matrix of a sublayer: its input is left at the last one, for all adapters there."""

    def __init__(self, last: Any):
        self.last = last

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.last.sublayer_input = Passed(args[0])


def first_of(model: Network, name: str) -> Any:
    """The matrix that reads the input of the sublayer that the matrix of this name ends; None: none does."""
    place, parts = layer_of(f"{name}."), FIRST.get(part_of(name) or "", ())
    shared, first = -1, None
    for other, module in linear_modules(model).items():
        if part_of(other) in parts and layer_of(f"{other}.") == place:
            length = len(commonprefix([other, name]))
            if length > shared:  # a decoder's cross-attention has matrices of its own
                shared, first = length, module
    return first


def hand_over(settings: Any, model: Network) -> None:
    """Have what sublayers read left at those of their last matrices that these settings choose. Raises
    ValueError where it is not known what a sublayer reads.
    """
    from luthier.methods.tuners._peft.chosen import chosen_modules

    for name, module in chosen_modules(settings, model).items():
        if part_of(name) not in FIRST:
            continue  # it ends no sublayer, and is read itself
        first = first_of(model, name)
        if first is None:
            raise ValueError(
                f"tuner '{settings.name}' does not know what the sublayer reads that {name} ends; set"
                " insertion: beside or sequential"
            )
        if not any(getattr(hook, "last", None) is module for hook in first._forward_pre_hooks.values()):
            first.register_forward_pre_hook(HandOver(module))


def sublayer_input(settings: Any, layer: Any) -> Tensor:
    """What the sublayer reads that this module ends, after `hand_over`."""
    passed = getattr(layer, "sublayer_input", None)
    if passed is None or passed.tensor is None:
        raise RecipeError(f"tuner '{settings.name}': a sublayer's last matrix was read without its first")
    return passed.tensor


@family
class SublayerAdapter(Bottleneck):
    """Family: h + the change by a bottleneck, at the end of sublayers."""

    part = None  # of the module that these settings are for

    sublayers: Literal["feed_forward", "attention", "both"] = "feed_forward"  # sublayers that have one
    # what the bottleneck reads: the sublayer's input (parallel), its output (sequential), or the input of the
    # module alone (beside, and where a module that is named ends no sublayer)
    insertion: Literal["parallel", "sequential", "beside"] = "parallel"
    reduction_factor: Annotated[float, Field(ge=1), NARROWER] = 4  # width divided by that of the bottleneck
    # width of the bottleneck, instead of reduction_factor
    bottleneck: Annotated[int, Field(ge=1)] | None = None
    non_linearity: Activation = "relu"  # nonlinearity f
    # modules that have an adapter; auto: the last ones of `sublayers`
    target_modules: str | list[str] = "auto"

    def ends(self) -> tuple[str, ...]:
        """What the last matrices of the chosen sublayers are."""
        return ENDS[self.sublayers]

    def enter(self, model):
        if self.insertion == "parallel":
            hand_over(self, model)

    def at(self, name):
        return placed(self, name)

    @property
    def reads_itself(self) -> bool:
        """Does the bottleneck read what its module reads?"""
        return self.insertion == "beside" or self.insertion == "parallel" and self.part not in FIRST

    def widths(self, W):
        width = W.shape[1 if self.reads_itself else 0]
        return width, self.bottleneck or max(1, round(width / self.reduction_factor))

    def source(self, x: Tensor, y: Tensor, layer: Any) -> Tensor:
        """What the bottleneck reads."""
        if self.insertion == "sequential":
            return y
        if self.reads_itself:
            return x
        return sublayer_input(self, layer).to(y.dtype)

    def forward(self, x, y, p, layer):
        h = self.source(x, y, layer)
        return self.composed(y, self.change(h, p, layer.training), p)

    def change(self, h: Tensor, p: Any, training: bool) -> Tensor:
        """[..., width] read -> [..., out] the change."""
        return through(h, p.down, p.down_bias, p.up, p.up_bias, self.non_linearity)

    def composed(self, y: Tensor, change: Tensor, p: Any) -> Tensor:
        """The sublayer's output with the change in it."""
        return y + change

    def numbers(self, width: int) -> int:
        """Trained numbers of one bottleneck that reads and changes states of this width."""
        k = self.bottleneck or max(1, round(width / self.reduction_factor))
        return 2 * width * k + k + width
