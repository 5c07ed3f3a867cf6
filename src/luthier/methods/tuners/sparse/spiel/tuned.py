"""SpIEL on a model: statistics gathered between exchanges, and the exchanges."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from luthier.methods.tuners._delta import oriented
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, PeftTunedModel, config_for
from luthier.processes.group import current

if TYPE_CHECKING:
    from luthier.methods.transforms._base import GradientMoments
    from luthier.model.network import Network

Stats = dict[str, Tensor]


class SpIELModel(PeftTunedModel):
    """The statistics gathered for the next exchange belong to the state, so a run resumes within an
    interval. Processes agree on them after every step in which they are gathered.
    """

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model, config_for(settings, model))
        self.sparse = {n: m for n, m in self.layers.items() if isinstance(m, DeltaLayer)}
        self.gathered: dict[str, Stats] = {}
        self.grown: dict[str, GradientMoments] = {}  # of the places that this phase has grown
        for name, layer in self.sparse.items():
            p, shape = layer.tensors(ADAPTER), tuple(oriented(layer.get_base_layer()).shape)
            stats = settings.nothing(shape, len(p.values), p.indices.dtype)
            self.gathered[name] = {k: t.to(p.values.device) for k, t in stats.items()}

    def memory(self):
        return {f"{n}.{k}": t for n, stats in self.gathered.items() for k, t in stats.items()}

    def on_phase(self, clock):
        method, share = self.settings, self.settings.share(clock.step, clock.total)
        resets: dict[str, Tensor] = {}
        self.grown = {}
        for name, layer in self.sparse.items():
            p, stats = layer.tensors(ADAPTER), self.gathered[name]
            if share:
                new = method.exchange(share, p.values, p.indices, stats)
                resets[f"{name}.values"] = new
                moments = method.moments(p.indices[new], stats)
                if moments is not None:
                    self.grown[f"{name}.values"] = moments
            if method.begins(clock.step):
                for t in stats.values():
                    t.zero_()
        return resets

    def gradient_moments(self):
        return self.grown

    def before_step(self, clock):
        for name, layer in self.sparse.items():
            params = cast(Any, layer.adapter_params[ADAPTER])
            params.watch = None
            if self.settings.watches(clock.step):
                params.watch = partial(self.settings.gather, stats=self.gathered[name])

    def after_step(self, clock):
        if self.settings.watches(clock.step):
            agree(list(self.gathered.values()))
            for stats in self.gathered.values():
                self.settings.close(stats)
        for name, layer in self.sparse.items():
            p, stats = layer.tensors(ADAPTER), self.gathered[name]
            if p.values.grad is not None:
                self.settings.follow(p.values.grad, p.indices, stats)

    def extra_grads(self, group):
        layer = self.sparse.get(group)
        if layer is None or not self.settings.l1:
            return {}
        return {"values": self.settings.l1 * layer.tensors(ADAPTER).values.detach().sign()}


@torch.no_grad()
def agree(every: list[Stats]) -> None:
    """What the processes of a run gathered in a step becomes the same in all of them: of their candidates
    those whose gradients, added over processes, are largest, and these sums. With one process nothing
    happens.
    """
    processes = current()
    if processes.count == 1 or not every:
        return
    passes = processes.sum(torch.stack([stats["passes"] for stats in every])).clamp(max=1)
    reached = []  # the others' weights no row reached in any of the processes
    for stats, passed in zip(every, passes, strict=True):
        stats["passes"].copy_(passed)
        if passed:
            reached.append(stats)
    own = [(stats["candidates"].cpu(), stats["current"].cpu()) for stats in reached]
    for stats, parts in zip(reached, zip(*processes.gather(own), strict=True), strict=True):
        places, sums = zip(*parts, strict=True)
        device = stats["current"].device
        join(stats, torch.cat(places).to(device), torch.cat(sums).to(device))


def join(stats: Stats, places: Tensor, sums: Tensor) -> None:
    """Candidates of several processes, one after another, with the sums of each: the common ones and theirs,
    in place.
    """
    union, owner = places.unique(return_inverse=True)
    totals = sums.new_zeros(len(union)).index_add_(0, owner, sums)
    if len(union) > len(stats["candidates"]):
        best = totals.abs().topk(len(stats["candidates"])).indices.sort().values
        union, totals = union[best], totals[best]
    stats["candidates"].copy_(union)
    stats["current"].copy_(totals)
