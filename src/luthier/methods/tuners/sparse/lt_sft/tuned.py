"""LT-SFT on a model: a dense phase, then a sparse one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import ParamGroup
from luthier.methods.tuners._delta import oriented
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, PeftTunedModel, config_for
from luthier.methods.tuners.sparse._sparse import largest, place_type, spread
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
        # module -> where its weight began; empty while the chosen places train
        self.began: dict[str, Tensor] = {}
        # module -> the places that earlier rounds chose, and their values as this round began
        self.earlier: dict[str, tuple[Tensor, Tensor]] = {}
        self.parameters_of_all = sum(p.numel() for p in model.parameters())
        if settings.counts is None:
            self._dense()

    # --- the two phases

    @torch.no_grad()
    def _dense(self, earlier: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> None:
        """All weights train, from the initial ones with what earlier rounds have learned."""
        self._set_counts(None)
        self.earlier = dict(earlier or {})
        for name, layer in self.sparse.items():
            base = layer.get_base_layer()
            weight = base.weight
            self.began[name] = weight.detach().clone()
            if name in self.earlier:
                places, values = self.earlier[name]
                change = spread(values, places, oriented(base).shape).to(weight.dtype)
                weight.add_(change.T if is_transposed(base) else change)
            weight.requires_grad_(True)
            self._hold(
                layer,
                torch.zeros(0, dtype=place_type(weight.numel()), device=weight.device),
                weight.new_zeros(0),
            )

    def _sparse(self, places: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None) -> None:
        """Put all weights back; these places move from here on."""
        self.earlier = {}
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
    def choose(self, turn: int | None = None, rewind: bool = True) -> None:
        """Add to the places of earlier rounds those that moved furthest, over all modules together, up to
        what round `turn` has (None: the last). rewind: values are those with which the round began.
        """
        settings = self.settings
        total = max(1, round(settings.density * sum(w.numel() for w in self.began.values())))
        last = settings.rounds - 1 if turn is None else turn
        before = sum(len(places) for places, _ in self.earlier.values())
        target = max(1, total * (last + 1) // settings.rounds)
        new = largest({n: partial(self._distances, n) for n in self.began}, max(target - before, 0))
        places, values = {}, {}
        for name, added in new.items():
            own, start = self.earlier.get(name, (added[:0], self.began[name].new_zeros(0).float()))
            every = torch.cat([own.long(), added])
            if rewind:
                value = torch.cat([start, start.new_zeros(len(added))])
            else:
                value = self._moved(name).flatten()[every]
            order = every.argsort()
            places[name] = every[order].to(place_type(self.began[name].numel()))
            values[name] = value[order]
        self._sparse(places, values)

    def _distances(self, name: str) -> Tensor:
        """[out * in] how far each entry has moved; below zero where an earlier round chose it."""
        distances = self._moved(name).abs().flatten()
        if name in self.earlier:
            distances[self.earlier[name][0].long()] = -1.0
        return distances

    def on_phase(self, clock):
        turn, dense, *_ = self.settings.phase(clock.step, clock.total)
        if self.began and not dense:
            self.choose(turn)
        elif dense and not self.began and turn:
            tensors = {n: m.tensors(ADAPTER) for n, m in self.sparse.items()}
            self._dense({n: (p.indices.clone(), p.values.detach().clone()) for n, p in tensors.items()})
        return {}

    def schedule_step(self, clock):
        if not self.settings.phase_schedule:
            return clock.step
        _, _, first, end = self.settings.phase(clock.step, clock.total)
        return (clock.step - first) * clock.total // max(end - first, 1)

    def extra_grads(self, group):
        name, _, leaf = group.rpartition(".")
        if self.began and leaf == "base_layer" and name in self.began and self.settings.l1:
            layer = self.sparse[name].get_base_layer()
            sign = (layer.weight.detach().float() - self.began[name].float()).sign()
            return {"weight": self.settings.l1 / self.parameters_of_all * sign}
        if not self.began and group in self.sparse and self.settings.sparse_l1:
            sign = self.sparse[group].tensors(ADAPTER).values.detach().sign()
            return {"values": self.settings.sparse_l1 / self.parameters_of_all * sign}
        return {}

    def why_not_elsewhere(self):
        return "it trains whole weights first and chosen entries afterwards, each on a schedule of its own"

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

    def memory(self):
        memory = {}
        for name, (places, values) in self.earlier.items():
            memory |= {f"{name}.earlier_places": places, f"{name}.earlier_values": values}
        return memory

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
        elif not counts:
            self._prepare_dense(tensors)

    def _prepare_dense(self, tensors: Mapping[str, Tensor]) -> None:
        """Into a dense phase whose earlier rounds chose as many places as `tensors` has."""
        earlier = {}
        for name in self.sparse:
            places = tensors.get(f"{name}.earlier_places")
            if places is not None:
                values = tensors[f"{name}.earlier_values"]
                device = self.sparse[name].get_base_layer().weight.device
                earlier[name] = (
                    torch.zeros_like(places, device=device),
                    torch.zeros_like(values, device=device),
                )
        sizes = {n: len(places) for n, (places, _) in earlier.items()}
        if self.began and sizes == {n: len(places) for n, (places, _) in self.earlier.items()}:
            return
        if self.began:
            self._sparse({n: w.new_zeros(0, dtype=torch.int32) for n, w in self.began.items()})
        self._dense(earlier)

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
