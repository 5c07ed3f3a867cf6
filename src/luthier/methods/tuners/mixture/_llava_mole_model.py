"""LLaVA-MoLE on a model: what each block's router has chosen, and the gradient of its balance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, PeftTunedModel, config_for
from luthier.methods.tuners._peft.chosen import chosen_modules
from luthier.model.anatomy import layer_of, part_of
from luthier.processes import group as processes

if TYPE_CHECKING:
    from luthier.model.network import Network


class Routing:
    """What one block's router says of the tokens that are read now, and what a step needs of all of them."""

    def __init__(self):
        self.clear()
        self.forget()

    def __deepcopy__(self, memo: Any) -> Routing:
        return Routing()  # a copy of the network has read nothing

    def clear(self) -> None:
        """The block is read."""
        self._choice: Tensor | None = None
        self.probability: Tensor | float = 1.0

    def forget(self) -> None:
        """The step is over."""
        self.tokens, self.counts, self.slopes = 0, None, None

    @property
    def choice(self) -> Tensor:
        """[...] the expert of each token."""
        if self._choice is None:
            raise RecipeError(
                "tuner 'llava_mole': a matrix of a feed-forward block was read before the one that routes"
            )
        return self._choice

    def read(self, x: Tensor, router: Tensor, training: bool) -> None:
        """Choose for the tokens x [..., in] by router [experts, in]; in training they count."""
        probabilities = F.linear(x, router).softmax(-1)
        best = probabilities.max(-1, keepdim=True)
        self._choice, self.probability = best.indices[..., 0], best.values
        if training and torch.is_grad_enabled():
            self.note(x.detach().flatten(0, -2), probabilities.detach().flatten(0, -2))

    @torch.no_grad()
    def note(self, x: Tensor, p: Tensor) -> None:
        """Tokens [T, in] and probabilities [T, experts]: how many go where, and the slopes of the sum of each
        probability by the router, [experts, experts, in].
        """
        size = p.shape[1]
        counts = torch.bincount(p.argmax(-1), minlength=size)
        by_logit = p[:, :, None] * (torch.eye(size).to(p) - p[:, None, :])  # [T, probability, logit]
        slopes = (by_logit.flatten(1).T @ x).view(size, size, -1)
        self.tokens += len(x)
        self.counts = counts if self.counts is None else self.counts + counts
        self.slopes = slopes if self.slopes is None else self.slopes + slopes


def route(settings: Any, model: Network) -> None:
    """Have the matrices of each feed-forward block share a routing. Raises ValueError where a block has no
    matrix that routes, or several.
    """
    blocks: dict[Any, Routing] = {}
    routers = []
    for name, module in chosen_modules(settings, model).items():
        part = part_of(name)
        if part in settings.block:
            place = layer_of(f"{name}.")
            module.routing = blocks.setdefault(place, Routing())
            if part == settings.router_part:
                routers.append(place)
    if len(set(routers)) < len(routers):
        raise ValueError("tuner 'llava_mole' supports one feed-forward block a layer")
    if len(routers) < len(blocks):
        raise ValueError(
            f"tuner 'llava_mole' routes at matrices '{settings.router_part}': target_modules must have them"
            " where it has others of a feed-forward block"
        )


class LlavaMoleModel(PeftTunedModel):
    """Blocks whose matrices share what their router chose."""

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model, config_for(settings, model))
        self.routings: dict[str, Routing] = {}  # name of the module that routes -> its block's
        for name, layer in self.layers.items():
            if isinstance(layer, DeltaLayer) and hasattr(layer.adapter_params[ADAPTER], "router"):
                base: Any = layer.get_base_layer()
                self.routings[name] = base.routing

    def before_step(self, clock):
        for routing in self.routings.values():
            routing.forget()

    def extra_grads(self, group):
        routing = self.routings.get(group)
        if routing is None or not self.settings.balance:
            return {}
        slope = balance_slope(routing)
        return {} if slope is None else {"router": self.settings.balance / len(self.routings) * slope}


def balance_slope(routing: Routing) -> Tensor | None:
    """[experts, in] the gradient by a router of sum_j (share of tokens of j) * (mean probability of j), over
    all tokens that all processes have read in this step; None where they have read none.
    """
    mine = routing.tokens, routing.counts, routing.slopes
    every = [part for part in processes.current().gather(mine) if part[0]]
    if not every:
        return None
    tokens = sum(part[0] for part in every)
    device = every[0][2].device if routing.slopes is None else routing.slopes.device
    share = sum(part[1].to(device) for part in every) / tokens
    slopes = sum(part[2].to(device) for part in every) / tokens
    return torch.einsum("j,jki->ki", share, slopes)
