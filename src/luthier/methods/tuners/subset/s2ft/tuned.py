"""S2FT on a model: channels and heads chosen by a norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.methods.tuners._delta import oriented
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, PeftTunedModel, config_for
from luthier.methods.tuners.subset.s2ft.parts import READS, WRITES
from luthier.model.anatomy import kind_of, layer_of, part_of
from luthier.model.linear import base_layer
from luthier.model.statistics import statistics

if TYPE_CHECKING:
    from luthier.model.network import Network

STATISTIC = {"activation": "input_norms", "gradient": "gradients"}


class S2FTModel(PeftTunedModel):
    """Which channels move is decided when it is attached, or from the first rows of a run."""

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model, config_for(settings, model))
        if settings.selection == "weight":
            weights = ((n, oriented(base_layer(m)).detach()) for n, m in self._coupled().items())
            self.choose(weights)

    def initialize(self, rows, roles):
        statistic = STATISTIC.get(self.settings.selection)
        if statistic is None:
            return
        modules = self._coupled()
        if self.settings.selection == "activation":
            modules = {n: m for n, m in modules.items() if part_of(n) in READS}
        with self.off():
            self.choose(statistics(statistic, modules, rows[: self.settings.init_rows], roles))

    def _coupled(self) -> dict[str, Any]:
        """The modules whose channels or heads belong together with those of a tuned one."""
        tuned = {place(name) for name in self.layers}
        coupled = {}
        for name, module in self.model.named_modules():
            if part_of(name) in (*READS, *WRITES) and place(name) in tuned:
                coupled[name] = module
        return coupled

    @torch.no_grad()
    def choose(self, measured: Iterable[tuple[str, Tensor]]) -> None:
        """Take the channels and groups of heads with the most, or least, of what was measured: of weights
        [out, in], or of what a module reads [in].
        """
        squares: dict[Any, Tensor] = {}
        for name, values in measured:
            square = values.float().square()
            if square.ndim == 2:
                square = square.sum(0 if part_of(name) in READS else 1)
            if kind_of(name) == "attention":
                square = square.view(self.settings.num_key_value_heads, -1).sum(1)
            squares[place(name)] = squares.get(place(name), 0) + square
        for name, layer in self.layers.items():
            assert isinstance(layer, DeltaLayer)
            method: Any = layer.methods[ADAPTER]
            p = layer.tensors(ADAPTER)
            largest = self.settings.extreme == "largest"
            order = squares[place(name)].argsort(descending=largest, stable=True).cpu()
            p.indices.copy_(method.chosen(int(p.size), order))


def place(name: str) -> tuple[Any, str]:
    """In which layer a module stands, and whether in attention or feed-forward."""
    return layer_of(f"{name}."), kind_of(name)
