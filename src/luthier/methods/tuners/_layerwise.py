"""Tuners that work on whole layers: what a layer answers is read, perhaps changed, and something is carried
on to the next layer beside the hidden states.

The tensors of a layer sit at its last matrix, so that they are PEFT layers as those of any Delta; a hook on
the layer does the work. What is carried on hangs at the hidden states themselves, so a layer that is computed
again in backward finds what it found before, whatever the network has read since.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from luthier.errors import RecipeError
from luthier.methods.tuners._delta import Delta
from luthier.model.anatomy import layer_of, part_of
from luthier.model.linear import linear_modules, oriented
from luthier.registry import INTERNAL, family

if TYPE_CHECKING:
    from luthier.model.network import Network

CARRIED = "_luthier_carried"  # attribute of hidden states: adapter -> what goes beside them


class LayerHook:
    """After a layer: its answer and what is carried on, by the tensors at the layer's module `holder`."""

    def __init__(self, holder: str):
        self.holder = holder

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        holder: Any = layer.get_submodule(self.holder)
        if not hasattr(holder, "adapter_params") or holder.disable_adapters or holder.merged:
            return None
        entering = args[0] if args else kwargs["hidden_states"]
        answer = output if isinstance(output, Tensor) else output[0]
        before, after = getattr(entering, CARRIED, {}), {}
        result = answer
        for adapter in holder.active_adapters:
            method = holder.methods.get(adapter)
            if not isinstance(method, Layerwise):
                continue
            p = holder.tensors(adapter)
            own = next(iter(holder.adapter_params[adapter].parameters())).dtype
            carried = before.get(adapter)
            if carried is None and not method.first:
                raise RecipeError(
                    f"tuner '{method.name}': {type(layer).__name__} does not hand over what the layer before"
                    " it carried on"
                )
            changed, after[adapter] = method.after_layer(entering.to(own), result.to(own), carried, p)
            if changed is not None:
                result = changed.to(answer.dtype)
        setattr(result, CARRIED, after)
        return result if isinstance(output, Tensor) else (result, *output[1:])


@family
class Layerwise(Delta):
    """Family: tensors for each layer, which read and change what the layer answers."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear,)

    # modules whose layers are taken part of; auto: every layer of the text's (last) list of layers
    target_modules: str | list[str] = "auto"
    # of the module that these settings are for:
    first: Annotated[bool, INTERNAL] = False  # is its layer the first one?
    last: Annotated[bool, INTERNAL] = False  # is its layer the last one?
    # modules of the first and the last layer; filled in when it is attached
    ends: Annotated[list[str] | None, INTERNAL] = None

    def attach(self, model):
        from luthier.methods.tuners._peft import PeftTunedModel, config_for
        from luthier.methods.tuners._peft.chosen import chosen_modules

        class LayerwiseModel(PeftTunedModel):
            reads_layers = True

        chosen = self
        if self.target_modules == "auto":
            every = "|".join(map(re.escape, last_matrices(model)))
            chosen = replace(self, target_modules=every)
        names = []
        if chosen.target_modules != "":  # nothing that is known ends a layer
            names = list(chosen_modules(chosen, model, required=True))
        holders: dict[int, str] = {}
        path = None
        for name in names:
            place = layer_of(f"{name}.")
            if place is None:
                continue
            if place[0] != path:  # another list of layers: an encoder's was before
                path, holders = place[0], {}
            holders[place[1]] = name
        if not holders:
            raise RecipeError(
                f"tuner '{self.name}' finds no layers in {type(model).__name__}; name modules that end them"
                " in target_modules"
            )
        order = [holders[index] for index in sorted(holders)]
        settings = replace(
            self,
            target_modules=order,
            exclude_modules=None,
            layers_to_transform=None,
            ends=[order[0], order[-1]],
        ).fitted(model)
        return LayerwiseModel(settings, model, config_for(settings, model))

    def fitted(self, model: Network) -> Self:
        """These settings with what depends on the network filled in."""
        return self

    def at(self, name):
        first, last = self.ends or ["", ""]
        return replace(self, first=name == first, last=name == last)

    def enter(self, model):
        from luthier.methods.tuners._peft.chosen import chosen_modules

        table = getattr(model.get_input_embeddings(), "weight", None)  # patches have none
        width = model.config.hidden_size if table is None else table.shape[1]
        for name, matrix in chosen_modules(self, model).items():
            place = layer_of(f"{name}.")
            if place is None or oriented(matrix).shape[0] != width:
                raise ValueError(f"{name} does not end a layer: its outputs are not hidden states")
            path = ".".join(map(str, place))
            layer, holder = model.get_submodule(path), name.removeprefix(f"{path}.")
            if not any(getattr(hook, "holder", None) == holder for hook in layer._forward_hooks.values()):
                layer.register_forward_hook(LayerHook(holder), with_kwargs=True)

    def after_layer(
        self, entering: Tensor, answer: Tensor, carried: Tensor | None, p: Any
    ) -> tuple[Tensor | None, Tensor]:
        """Hidden states [..., width] that enter a layer and that it answers, and what the layer before
        carried on (None at the first one) -> the answer in its place, None: as it is; and what is carried on.
        """
        raise NotImplementedError

    def forward(self, x, y, p, layer):
        return y

    def weight(self, W, p):
        raise NotImplementedError(f"tuner '{self.name}' computes beside the weights and has no tuned weight")


def last_matrices(model: Network) -> dict[str, Any]:
    """Of each layer the matrix that comes last in it: of its feed-forward block, else of its attention."""
    ends: dict[tuple[str, int], str] = {}
    modules = linear_modules(model)
    for part in ("o", "down"):
        for name in modules:
            place = layer_of(f"{name}.")
            if place is not None and part_of(name) == part:
                ends[place] = name
    chosen = set(ends.values())
    return {name: module for name, module in modules.items() if name in chosen}
