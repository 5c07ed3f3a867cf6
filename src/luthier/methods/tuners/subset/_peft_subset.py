"""Subsets of weights on a model: masks, supports that shrink, plans made from data. Beside _peft.py, for
those who know PEFT.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.tuners_utils import check_target_module_exists as exists
from torch import Tensor

from luthier.methods.tuners._delta import oriented
from luthier.methods.tuners._peft import ADAPTER, Layer, OnPeft, Tensors, config_of, plain_settings
from luthier.methods.tuners.sparse.r_amt import pack, unpack
from luthier.model.sensitivity import matrices, squared_gradients
from luthier.storage import checkpoints

if TYPE_CHECKING:
    from luthier.model.network import Network


def _on(settings: Any, model: Network) -> tuple[Any, Network, Any]:
    return settings, model, config_of(type(settings))(**plain_settings(settings))


def chosen_modules(settings: Any, model: Network) -> dict[str, Any]:
    """The modules that `target_modules` and the other settings of Where choose, before anything is put into
    the model.
    """
    config = _on(settings, model)[2]
    head = model.get_output_embeddings()
    if config.target_modules == "all-linear":
        out = set(config.exclude_modules or ())
        return {
            n: m
            for n, m in matrices(model).items()
            if m is not head and not any(n == e or n.endswith(f".{e}") for e in out)
        }
    found = {
        n: m for n, m in model.named_modules() if not isinstance(m, BaseTunerLayer) and exists(config, n)
    }
    return {n: m for n, m in found.items() if isinstance(getattr(m, "weight", None), torch.Tensor)}


class Masked(OnPeft):
    """Masks in adapter files are bits."""

    def __init__(self, settings: Any, model: Network):
        super().__init__(*_on(settings, model))

    def memory(self):
        return {k: p for k, p in self.parameters().items() if k.endswith(".M")}

    def state(self):
        said = super().state()
        masks = {k[:-1]: v > self.settings.threshold for k, v in said.items() if k.endswith(".M")}
        return {
            k: pack(masks[k[:-4]] & unpack(v, masks[k[:-4]].shape)) if k.endswith(".bits") else v
            for k, v in said.items()
            if k[-2:] != ".M"
        }

    def unpack(self, file):
        """M from the bits: where it started, or zero. The bits are all set again, so that training may
        unmask.
        """
        out = dict(file)
        for layer, M in ((n, p) for n, p in self.parameters().items() if n.endswith(".M")):
            stem = f"base_model.model.{layer[:-2]}.{self.placer.prefix}."
            bits = next(k for k in file if k.startswith(stem) and k.endswith(".bits"))
            out[bits[:-4] + "M"] = unpack(file[bits], M.shape).float() * self.settings.mask_init
            out[bits] = torch.full_like(file[bits], 255)
        return out


class Progressive(OnPeft):
    """Entries that have grown come to rest at one point of the run; the optimizer begins anew with the
    others.
    """

    def __init__(self, settings: Any, model: Network):
        super().__init__(*_on(settings, model))
        self.anew: set[str] = set()
        self.sparse = {n: m for n, m in self.layers.items() if isinstance(m, Layer)}
        self.live: dict[str, Tensor] = {}  # module -> [k] which of its entries have not come to rest
        for name in self.sparse:
            values = self.parameters()[f"{name}.values"]
            self.live[name] = torch.ones(values.shape, dtype=torch.bool, device=values.device)
            values.register_hook(lambda grad, name=name: self.pulled(name, grad) * self.live[name])
        # a module, and what is added to its gradient in this step
        self.pull: tuple[str, Tensor] | None = None

    def memory(self):
        return {f"{n}.live": live for n, live in self.live.items()}

    def pulled(self, name: str, grad: Tensor) -> Tensor:
        """The gradient of the first micro-batch takes the pull along."""
        if self.pull is None or self.pull[0] != name:
            return grad
        pull, self.pull = self.pull[1], None
        return grad + pull.to(grad)

    @torch.no_grad()
    def before_step(self, clock):
        if self.settings.lambda_rank:
            large = [n for n, shape in self.shapes().items() if min(shape) > self.settings.min_side] or list(
                self.sparse
            )
            name = large[int(torch.randint(len(large), (1,), generator=clock.rng("sara")))]
            # whose gradients add up
            processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            self.pull = name, self.nuclear(name) * self.settings.lambda_rank / processes
        if (
            clock.step == 0
            or clock.step != round(self.settings.progressive * clock.total)
            or self.settings.progressive >= 1
        ):
            return
        for name, layer in self.sparse.items():
            p = layer.tensors(ADAPTER)
            self.live[name].logical_and_(self.settings.small(oriented(layer.get_base_layer()), p))
            self.anew.add(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """[out, in] of every tuned weight."""
        return {n: tuple(oriented(m.get_base_layer()).shape) for n, m in self.sparse.items()}

    def nuclear(self, name: str) -> Tensor:
        """[k] the gradient of the nuclear norm of a tuned weight where it moves: U V' at its places."""
        layer = self.sparse[name]
        p = layer.tensors(ADAPTER)
        U, _, Vh = torch.linalg.svd(
            self.settings.masked(oriented(layer.get_base_layer()), p), full_matrices=False
        )
        return (U @ Vh).flatten()[p.indices.long()]

    def reset_masks(self, group):
        if group not in self.anew:
            return {}
        self.anew.discard(group)
        values = self.parameters()[f"{group}.values"]
        return {"values": torch.ones(values.shape, dtype=torch.bool, device=values.device)}


class Sensitive(OnPeft):
    """Layers get their tensors from a plan, which is made when rows are seen."""

    def __init__(self, settings: Any, model: Network):
        super().__init__(*_on(settings, model))

    def initialize(self, rows, roles):
        modules = {n: m.get_base_layer() for n, m in self.layers.items()}
        with self.off():
            scores = squared_gradients(modules, rows[: self.settings.init_rows], roles)
        plan, places = self.settings.planned({n: s.cpu() for n, s in scores.items()})
        self.follow(plan)
        for name, at in places.items():
            indices = self.layers[name].held[ADAPTER].indices  # pyright: ignore
            indices.copy_(at.sort().values.to(indices.dtype))

    def follow(self, plan: dict[str, int]) -> None:
        """Give every layer the tensors that the plan has for it, fresh."""
        self.settings = replace(self.settings, plan=plan)
        config: Any = self.peft.peft_config[ADAPTER]
        config.plan = plan
        for name, layer in self.layers.items():
            assert isinstance(layer, Layer)
            W = oriented(layer.get_base_layer()).detach()
            layer.methods[ADAPTER] = method = self.settings.at(name)
            layer.held[ADAPTER] = Tensors(method.init(W)).to(W.device)
        self.__dict__.pop("found", None)

    def read(self, folder):
        path = Path(folder) / "adapter_config.json"
        if not checkpoints.paths(Path(folder)) and path.is_file():
            plan = json.loads(path.read_text(encoding="utf-8")).get("plan")
            if isinstance(plan, dict) and plan.keys() == self.settings.plan.keys():
                self.follow(plan)
        return super().read(folder)

    def load(self, tensors):
        """Of a plan that is another, too: it shows in the shapes."""
        plan = dict(self.settings.plan)
        for name in plan:
            if (A := tensors.get(f"{name}.A")) is not None:
                plan[name] = -len(A)
            elif (values := tensors.get(f"{name}.values")) is not None:
                plan[name] = len(values)
        if plan != self.settings.plan:
            self.follow(plan)
        super().load(tensors)
