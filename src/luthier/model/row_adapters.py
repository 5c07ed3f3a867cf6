"""Several LoRA adapters on one frozen base while it generates: each row of a batch goes through its own.

The base's products are computed once for all rows; what an adapter adds, its rows alone get. An adapter sits
on a network of its own that shares its weights with the base (train/batched_forward.py), so it is loaded and
checked as if it were alone. A row gets what it gets alone, up to the rounding of products of other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from luthier.methods.tuners._base import TunedModel
    from luthier.model.network import Network

Factors = list[tuple[Tensor, Tensor]]  # A' [in, r] and scaled B' [r, out] of what is added to one layer


class RowAdapters:
    """The adapters of tuned models, whose `why_not_batched` is None, on one network."""

    def __init__(self, model: Network, tuned: Sequence[TunedModel]):
        self.factors: list[dict[str, Factors]] = [factors_of(each) for each in tuned]
        # adapter -> which rows are its own; None: all of them
        self.rows: dict[int, Tensor | None] = {}
        self.device = model.get_input_embeddings().weight.device
        names: dict[str, None] = {}  # in order
        for factors in self.factors:
            names.update(dict.fromkeys(factors))
        for name in names:
            module = model.get_submodule(name)
            module.forward = self.adapted(name, module.forward)

    def adapted(self, name: str, base: Any) -> Any:
        """The forward of a layer with what each adapter adds."""
        by_adapter = [factors.get(name, []) for factors in self.factors]

        def forward(x: Tensor) -> Tensor:
            y = base(x)
            for adapter, rows in self.rows.items():
                for A, B in by_adapter[adapter]:
                    own_x, own_y = (x, y) if rows is None else (x[rows], y[rows])
                    low = own_x.reshape(-1, x.shape[-1]) @ A
                    own_y.view(-1, y.shape[-1]).addmm_(low, B)
                    if rows is not None:
                        y[rows] = own_y
            return y

        return forward

    @contextmanager
    def on(self, adapters: Sequence[int | None]) -> Iterator[None]:
        """While the network reads rows [R, ...]: the adapter of each; None is the base alone."""
        for adapter in dict.fromkeys(adapters):
            if adapter is None:
                continue
            places = [row for row, own in enumerate(adapters) if own == adapter]
            rows = None
            if len(places) < len(adapters):
                rows = torch.tensor(places, device=self.device)
            self.rows[adapter] = rows
        try:
            yield
        finally:
            self.rows = {}


@torch.no_grad()
def factors_of(tuned: Any) -> dict[str, Factors]:
    """What a tuned model adds to each layer, in the layer's precision."""
    by_layer: dict[str, Factors] = {}
    for name, layer in tuned.layers.items():
        dtype = layer.get_base_layer().weight.dtype
        by_layer[name] = []
        for A, B, scale in layer.updates():
            by_layer[name].append((A.to(dtype).T, (B * scale).to(dtype).T))
    return by_layer
