"""Layers that read each row in its own way: which row every place of a network's tensors belongs to, and
low-rank updates that are computed for the rows that share one.

Outside of luthier nobody says which row is read; there every place has the route -1, whose meaning is the
tuner's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, PeftTunedModel, config_for
from luthier.registry import did_you_mean

if TYPE_CHECKING:
    from luthier.model.batch import Batch
    from luthier.model.network import Network

Factors = Callable[[int], tuple[Tensor, Tensor] | None]


def unrouted() -> tuple[str, Tensor]:
    """The tensor `route` of a layer, before anybody has said what is read; it is not saved."""
    return ("seeded", torch.empty(0, dtype=torch.long))


def spread(route: Tensor, shape: torch.Size) -> Tensor | None:
    """The route of each row [R], or place [R, W] -> that of each place of a tensor [R, W], or flattened to
    [R * W]. None where the tensor is of other rows.
    """
    if route.shape == shape or route.numel() == shape.numel():
        return route.reshape(shape)
    if route.ndim != 1 or not len(route) or shape[0] % len(route):
        return None
    if len(shape) > 1 and shape[0] == len(route):
        return route.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    return route.repeat_interleave(shape[0] // len(route)) if len(shape) == 1 else None


def low_rank(x: Tensor, route: Tensor, factors: Factors, out: int) -> Tensor:
    """x [..., in] -> [..., out] through A [r, in] and B [out, r] of each place's route; nothing where a route
    has no factors. Every update is computed for its own places alone.
    """
    places = spread(route, x.shape[:-1])
    routes = [-1] if places is None else places.unique().tolist()
    if len(routes) == 1:
        pair = factors(routes[0])
        return x.new_zeros(*x.shape[:-1], out) if pair is None else x @ pair[0].T @ pair[1].T
    assert places is not None
    flat, where = x.reshape(-1, x.shape[-1]), places.reshape(-1)
    y = x.new_zeros(len(flat), out)
    for one in routes:
        pair = factors(one)
        if pair is not None:
            rows = (where == one).nonzero()[:, 0]
            y = y.index_add(0, rows, flat[rows] @ pair[0].T @ pair[1].T)
    return y.reshape(*x.shape[:-1], out)


def added(y: Tensor, route: Tensor, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """y [..., width] plus, at the places of every route from 0 on, what that route's function makes of them;
    nothing where a place has the route -1.
    """
    places = spread(route, y.shape[:-1])
    if places is None:  # nobody says which rows these are
        return y
    where, flat = places.reshape(-1), y.reshape(-1, y.shape[-1])
    for one in places.unique().tolist():
        if one >= 0:
            rows = (where == one).nonzero()[:, 0]
            flat = flat.index_add(0, rows, change(flat[rows], one))
    return flat.reshape(y.shape)


class RoutedModel(PeftTunedModel):
    """A Delta whose layers have a tensor `route`, filled before anything is read."""

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model, config_for(settings, model))
        self.per_row = True

    def routes(self, batch: Batch) -> Tensor:
        """[G] the route of each row of a batch."""
        raise NotImplementedError

    def prompt_routes(self, prompts: list[list[int]], rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """[B] the route of each prompt; rows may be empty."""
        raise NotImplementedError

    def on_rows(self, batch, rows):
        if self.per_row:
            self.set_route(self.routes(batch).to(rows.device)[rows])

    def on_prompts(self, prompts, rows):
        if self.per_row:
            self.set_route(self.prompt_routes(prompts, rows))

    def on_selected(self, index):
        if self.per_row:
            self.set_route(self.route[index.to(self.route.device)])

    def set_route(self, route: Tensor) -> None:
        """Of each row, or place, that is read next."""
        self.route = route
        for layer in self.layers.values():
            if isinstance(layer, DeltaLayer):
                params: Any = layer.adapter_params[ADAPTER]
                params._buffers["route"] = route.to(layer.get_base_layer().weight.device)


class NamedRows(RoutedModel):
    """A row's column `column` names its route: one of the names that the setting `listed` lists."""

    column, listed = "task", "tasks"

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model)
        self.per_row = self.names is not None

    @property
    def names(self) -> list[str] | None:
        """The names of the routes; None: rows do not differ."""
        return getattr(self.settings, self.listed)

    def route_of(self, row: Any) -> int:
        """The number of what a row names; -1: it names nothing. Raises RecipeError for another name."""
        name, names = row.get(self.column), self.names or []
        if name is None:
            return -1
        if str(name) not in names:
            raise RecipeError(
                f"a row has {self.column} '{name}', which tuner '{self.settings.name}' does not list in"
                f" {self.listed}{did_you_mean(str(name), names)}"
            )
        return names.index(str(name))

    def routes(self, batch):
        return torch.tensor([self.route_of(row) for row in batch.rows])

    def prompt_routes(self, prompts, rows):
        if not rows:
            return torch.full((len(prompts),), -1)
        return torch.tensor([self.route_of(row) for row in rows])
