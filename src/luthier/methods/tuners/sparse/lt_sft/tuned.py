"""LT-SFT on a model: a dense phase, then a sparse one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import ParamGroup
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, PeftTunedModel, config_for
from luthier.methods.tuners.sparse._sparse import largest, place_type
from luthier.model.linear import is_transposed
from luthier.model.quantized_linear import Quantized
from luthier.storage import files

if TYPE_CHECKING:
    from luthier.model.network import Network


class LotteryTicketModel(PeftTunedModel):
    """Before the selection the modules' own weights are trained and their initial values are kept; afterwards
    the base weights are restored and the selected entries are trained.
    """

    def __init__(self, settings: Any, model: Network):
        begun = replace(settings, counts=settings.counts or {})
        super().__init__(settings, model, config_for(begun, model))
        self.sparse = {n: m for n, m in self.layers.items() if isinstance(m, DeltaLayer)}
        coded = next((n for n, m in self.sparse.items() if isinstance(m.get_base_layer(), Quantized)), None)
        if coded and settings.counts is None:
            raise RecipeError(
                f"tuner 'lt_sft' first trains full weights, but {coded} is quantized; leave quantization out"
            )
        # module -> where its weight began; empty once the places are chosen
        self.began: dict[str, Tensor] = {}
        if settings.counts is None:
            self._dense()

    # --- the two phases

    def _dense(self) -> None:
        self._set_counts(None)
        for name, layer in self.sparse.items():
            weight = layer.get_base_layer().weight.requires_grad_(True)
            self.began[name] = weight.detach().clone()
            self._hold(
                layer,
                torch.zeros(0, dtype=place_type(weight.numel()), device=weight.device),
                weight.new_zeros(0),
            )

    def _sparse(self, places: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None) -> None:
        """Put all weights back; these places move from here on."""
        self._set_counts({n: len(p) for n, p in places.items()})
        for name, layer in self.sparse.items():
            weight, at = layer.get_base_layer().weight, places[name]
            if name in self.began:
                weight.requires_grad_(False).copy_(self.began.pop(name))
                weight.grad = None
            self._hold(layer, at, weight.new_zeros(len(at)) if values is None else values[name])

    def _set_counts(self, counts: dict[str, int] | None) -> None:
        self.settings = replace(self.settings, counts=counts)
        cast(Any, self.peft.peft_config[ADAPTER]).counts = counts
        self.__dict__.pop("own_param_groups", None)

    def _hold(self, layer: DeltaLayer, places: Tensor, values: Tensor) -> None:
        params = cast(Any, layer.adapter_params[ADAPTER])
        params.indices, params.values = places, nn.Parameter(values.detach().float().clone())

    def _moved(self, name: str) -> Tensor:
        """[out, in] how far a weight is from where it began."""
        base = self.sparse[name].get_base_layer()
        delta = base.weight.detach().float() - self.began[name].float()
        return delta.T if is_transposed(base) else delta

    @torch.no_grad()
    def choose(self, rewind: bool = True) -> None:
        """The places that moved furthest, over all modules together; rewind: their values start at zero."""
        total = sum(w.numel() for w in self.began.values())
        k = max(1, round(self.settings.density * total))
        places = largest({n: lambda n=n: self._moved(n).abs().flatten() for n in self.began}, k)
        values = None if rewind else {n: self._moved(n).flatten()[p] for n, p in places.items()}
        self._sparse({n: p.to(place_type(self.began[n].numel())) for n, p in places.items()}, values)

    def on_phase(self, clock):
        if self.began and clock.step >= round(self.settings.dense_share * clock.total):
            self.choose()
        return {}

    # --- what moves

    def all_param_groups(self):
        sparse = self.own_param_groups
        if not self.began:
            return sparse
        bases = ((n, m.get_base_layer().weight) for n, m in self.sparse.items())
        dense = [
            ParamGroup(f"{n}.base_layer", {"weight": cast(nn.Parameter, w)}, self.settings) for n, w in bases
        ]
        return [*dense, *(s for s in sparse if s.name not in self.sparse)]

    def frozen_tensors(self):
        return {} if self.began else super().frozen_tensors()

    @torch.no_grad()
    def prepare_load(self, tensors):
        """Into the phase of what is loaded: it shows in the names, and in how many places were chosen."""
        counts = {n: len(tensors[f"{n}.values"]) for n in self.sparse if f"{n}.values" in tensors}
        if len(counts) == len(self.sparse) and counts != self.settings.counts:
            places = {}
            for name, k in counts.items():
                weight = self.sparse[name].get_base_layer().weight
                places[name] = torch.zeros(k, dtype=place_type(weight.numel()), device=weight.device)
            self._sparse(places)
        elif not counts and not self.began:
            self._dense()

    @contextmanager
    def using(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Also whole weights of the dense phase while sparse ones train: they stand in for base and
        difference together. No parameter is exchanged for another, since a step may be amid its losses.
        """
        state = self.state(parts=False)
        if all(k in tensors and tensors[k].shape == v.shape for k, v in state.items()):
            with super().using(tensors):
                yield
            return
        if self.began:
            raise RecipeError("tuner 'lt_sft': the chosen entries are only known after the first phase")
        weights = {n: m.get_base_layer().weight for n, m in self.sparse.items()}
        own = {n: w.data for n, w in weights.items()}
        try:
            for name, weight in weights.items():
                weight.data = tensors[f"{name}.base_layer.weight"].to(weight.dtype)
                self.sparse[name]._disable_adapters = True
            with super().using({**state, **tensors}):
                yield
        finally:
            for name, weight in weights.items():
                weight.data = own[name]
                self.sparse[name]._disable_adapters = False

    @contextmanager
    def off(self) -> Iterator[None]:
        weights = {n: self.sparse[n].get_base_layer().weight.data for n in self.began}
        try:
            for n in weights:
                self.sparse[n].get_base_layer().weight.data = self.began[n]
            with super().off():
                yield
        finally:
            for n, data in weights.items():
                self.sparse[n].get_base_layer().weight.data = data

    # --- files

    @contextmanager
    def _chosen(self) -> Iterator[None]:
        """For a while as if the choice had been made: the largest differences, as they stand."""
        if not self.began:
            yield
            return
        before = self.tensors()
        self.choose(rewind=False)
        try:
            yield
        finally:
            self.load(before)

    def save(self, folder):
        with self._chosen():
            super().save(folder)

    def export_lora(self, folder, rank=None):
        with self._chosen():
            return super().export_lora(folder, rank)

    def read(self, folder):
        path = Path(folder) / "adapter_config.json"
        if path.is_file() and (Path(folder) / "adapter_model.safetensors").is_file():
            counts = files.read_object(path).get("counts") or {}
            own = {n: self.sparse[n].get_base_layer().weight for n in self.sparse}
            zeros = lambda n: torch.zeros(
                counts.get(n, 0), dtype=place_type(own[n].numel()), device=own[n].device
            )
            with torch.no_grad():
                self._sparse({n: zeros(n) for n in self.sparse})
        return super().read(folder)
