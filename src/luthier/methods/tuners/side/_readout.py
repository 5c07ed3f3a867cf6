"""Networks of labels whose answers are computed beside them, from what their layers say: nothing of the
network itself needs a gradient, and its own head is read no more.

Hooks note what the network reads and the states of its layers; in the place of its logits stand those that
the tuner makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import ParamGroup, Tuner
from luthier.methods.tuners._tensor_file import TensorFile
from luthier.model.anatomy import layer_of
from luthier.registry import family

if TYPE_CHECKING:
    from luthier.model.network import Network


@dataclass
class Reading:
    """What a network reads, and what it says of it before its head."""

    inputs: Tensor  # [R, W] tokens, or [R, ...] numbers of images and recordings
    mask: Tensor | None = None  # [R, W] which of the tokens are none of padding
    states: list[Tensor] = field(default_factory=list)  # [R, T, d] behind each layer, lowest first
    last: Tensor | None = None  # [R, T, d] before the head
    entering: Tensor | None = None  # [R, T, d] before the first layer

    def weights(self, states: Tensor) -> Tensor:
        """[R, T] the share of each place of `states` [R, T, d] in their mean: none of padding has one."""
        inside = torch.ones(states.shape[:2], device=states.device)
        if self.mask is not None and self.mask.shape == inside.shape:
            inside = self.mask.to(inside)
        return inside / inside.sum(1, keepdim=True).clamp(min=1)

    def mean(self, states: Tensor) -> Tensor:
        """[R, T, d] -> [R, d], in fp32."""
        return torch.einsum("rt,rtd->rd", self.weights(states), states.float())


@family
class Readout(Tuner):
    """Family: labels out of the states of a frozen network."""

    on_quantized: ClassVar[bool] = True

    def attach(self, model):
        self.check_labels(model)
        trained, fixed = self.tensors(model)
        model.fresh = []  # the network's own head and pooler are read no more
        return ReadoutModel(self, model, trained, fixed)

    def check_labels(self, model: Network) -> None:
        """Raises RecipeError where a network gives no labels of whole inputs."""
        if not hasattr(model.config, "num_labels") or model.get_output_embeddings() is not None:
            raise RecipeError(
                f"tuner '{self.name}' answers with labels, and {type(model).__name__} has none; it needs an"
                " architecture such as classifier or image_classifier"
            )
        if type(model).__name__.endswith("ForTokenClassification"):
            raise RecipeError(
                f"tuner '{self.name}' gives one answer to a whole input, and {type(model).__name__}"
                " one to each token; use lora there"
            )

    def tensors(self, model: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors that train, and those that are saved beside them."""
        raise NotImplementedError

    def answers(self, reading: Reading, p: SimpleNamespace) -> Tensor:
        """[R, labels] logits of what was read, with the tensors of `tensors`."""
        raise NotImplementedError


class ReadoutModel(TensorFile):
    """A frozen network, and tensors that make its logits."""

    file = "readout.safetensors"

    def __init__(self, settings: Any, model: Network, trained: dict[str, Tensor], fixed: dict[str, Tensor]):
        super().__init__(settings, model.requires_grad_(False))
        device = next(model.parameters()).device
        self.trained = {name: nn.Parameter(t.float().to(device)) for name, t in trained.items()}
        self.fixed = {name: t.to(device) for name, t in fixed.items()}
        self.disabled = False
        self.reading: Reading | None = None
        network: Any = model
        network.register_forward_pre_hook(self.begin, with_kwargs=True)
        for place, layer in enumerate(layers_of(network)):
            if not place:
                layer.register_forward_pre_hook(self.note_entering, with_kwargs=True)
            layer.register_forward_hook(self.note_layer)
        network.base_model.register_forward_hook(self.note_last)
        network.register_forward_hook(self.answer)

    # --- hooks

    def begin(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the network reads."""
        inputs = args[0] if args else kwargs.get(module.main_input_name)
        if inputs is None:
            raise RecipeError(
                f"tuner '{self.settings.name}' reads tokens, images or recordings, no embeddings"
            )
        self.reading = Reading(inputs, kwargs.get("attention_mask"))

    def note_entering(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.reading is not None:
            states = args[0] if args else kwargs.get("hidden_states")
            self.reading.entering = None if states is None else states.detach()

    def note_layer(self, module: Any, args: tuple, output: Any) -> None:
        if self.reading is not None:
            self.reading.states.append(first_of(output).detach())

    def note_last(self, module: Any, args: tuple, output: Any) -> None:
        if self.reading is not None:
            self.reading.last = places_of(first_of(output).detach())

    def answer(self, module: Any, args: tuple, output: Any) -> Any:
        """After the network has read: its logits are the tuner's."""
        reading, self.reading = self.reading, None
        if self.disabled or reading is None:
            return None
        logits = self.settings.answers(reading, self.named())
        output["logits"] = logits.to(output.logits.dtype)
        return output

    def named(self) -> SimpleNamespace:
        """The tensors by name."""
        return SimpleNamespace(**self.trained, **self.fixed)

    # --- the interface to a run

    def all_param_groups(self):
        return [ParamGroup("readout", dict(self.trained), self.settings)]

    def frozen_tensors(self):
        return {f"fixed.{name}": tensor for name, tensor in self.fixed.items()}

    @contextmanager
    def off(self) -> Iterator[None]:
        was, self.disabled = self.disabled, True
        try:
            yield
        finally:
            self.disabled = was

    def why_not_elsewhere(self):
        return "it makes the labels beside the network, which luthier's own files alone hold"


def layers_of(model: Any) -> list[nn.Module]:
    """The layers of a network, lowest first: of its last list of them."""
    lists: dict[str, list[nn.Module]] = {}
    last = ""
    for name, module in model.named_modules():
        place = layer_of(f"{name}.")
        if place is not None and name == f"{place[0]}.{place[1]}":
            last = place[0]
            lists.setdefault(last, []).append(module)
    return lists.get(last, [])


def width_of(model: Any, tuner: str) -> int:
    """The width of a network's states. Raises RecipeError where it has none."""
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    if width is None or not layers_of(model):
        raise RecipeError(f"tuner '{tuner}' finds no layers of states in {type(model).__name__}")
    return width


def first_of(output: Any) -> Tensor:
    """The states in what a module says."""
    return output if isinstance(output, Tensor) else output[0]


def places_of(states: Tensor) -> Tensor:
    """[R, T, d]; of maps [R, d, H, W] each point is a place."""
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states
