"""SPT on a model: layers get their tensors from a plan, which is computed from rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.methods.tuners._delta import norms_of, oriented
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, DeltaParams, PeftTunedModel, config_for
from luthier.model.statistics import gather
from luthier.storage import checkpoints, files

if TYPE_CHECKING:
    from luthier.model.network import Network

# tensor of a part -> the end of what a plan calls its weight, and whether it counts entries or is a module
SIZES = {"A": ("", -1), "down": ("", -1), "values": ("", 1), "bias_values": (".bias", 1)}


def vectors_of(model: Network, modules: Mapping[str, Any], layers: list[int]) -> dict[str, nn.Parameter]:
    """Name -> norms' weights and biases, and the biases of these modules. layers: of which; empty: all."""
    vectors, norms = {}, norms_of(model, layers)
    for name, module in model.named_modules():
        if name in norms and module.weight is not None:
            vectors[f"{name}.weight"] = module.weight
        if (name in norms or name in modules) and getattr(module, "bias", None) is not None:
            vectors[f"{name}.bias"] = module.bias
    return vectors


class SPTModel(PeftTunedModel):
    """Layers get their tensors from a plan, which is computed from rows."""

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model, config_for(settings, model))

    def initialize(self, rows, roles):
        plan, modules = self.settings.plan, {n: m.get_base_layer() for n, m in self.layers.items()}
        rows = rows[: self.settings.init_rows]
        with self.off(), squared_biases(modules, plan) as biases:
            weights = gather("squared_gradients", modules, rows, roles)
        scores = {}
        for name in plan:
            if name.endswith(".bias"):
                scores[name] = biases[name].cpu()
                continue
            layer = name if name in weights else name.removesuffix(".weight")
            if layer in weights:  # what no loss depends on, such as a pooler that is not read, has no score
                scores[name] = weights[layer].cpu()
        plan, places = self.settings.planned(scores)
        self.follow(plan)
        for name, at in places.items():
            module, slot = name.removesuffix(".weight"), "indices"
            if name.endswith(".bias"):
                module, slot = name.removesuffix(".bias"), "bias_indices"
            indices = getattr(self.layers[module].adapter_params[ADAPTER], slot)  # pyright: ignore
            indices.copy_(at.sort().values.to(indices.dtype))

    def follow(self, plan: dict[str, int]) -> None:
        """Give every layer the tensors that the plan has for it, fresh."""
        self.settings = replace(self.settings, plan=plan)
        config: Any = self.peft.peft_config[ADAPTER]
        config.plan = plan
        for name, layer in self.layers.items():
            assert isinstance(layer, DeltaLayer)
            W = oriented(layer.get_base_layer()).detach()
            layer.methods[ADAPTER] = method = self.settings.at(name)
            layer.adapter_params[ADAPTER] = DeltaParams(method.init(W)).to(W.device)
        self.__dict__.pop("own_param_groups", None)

    def read(self, folder):
        path = Path(folder) / "adapter_config.json"
        if not checkpoints.paths(Path(folder)) and path.is_file():
            plan = files.read_object(path).get("plan")
            if isinstance(plan, dict) and plan.keys() == self.settings.plan.keys():
                self.follow(plan)
        return super().read(folder)

    def prepare_load(self, tensors):
        """A plan that is another shows in the shapes."""
        plan = dict(self.settings.plan)
        for name in self.layers:
            weight = f"{name}.weight" if f"{name}.weight" in plan else name
            if f"{name}.bias" in plan:
                plan[f"{name}.bias"] = 0
            for slot, (end, sign) in SIZES.items():
                tensor = tensors.get(f"{name}.{slot}")
                if tensor is not None:
                    plan[f"{name}{end}" if end else weight] = sign * len(tensor)
        if plan != self.settings.plan:
            self.follow(plan)


@contextmanager
def squared_biases(modules: Mapping[str, Any], plan: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """While gradients are computed: name of a bias in the plan -> the sum of its squared gradients."""
    squares, handles, biases = {}, [], []

    def add(name: str, bias: Tensor) -> None:
        assert bias.grad is not None
        squares[name] += bias.grad.float().square()
        bias.grad = None

    for name, module in modules.items():
        key = f"{name}.bias"
        if key in plan:
            squares[key] = torch.zeros_like(module.bias, dtype=torch.float32)
            biases.append(module.bias.requires_grad_(True))
            handles.append(module.bias.register_post_accumulate_grad_hook(partial(add, key)))
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()
        for bias in biases:
            bias.requires_grad_(False)
