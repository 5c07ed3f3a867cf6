"""What LLaVA-like networks share whose image features come by another way than tower and projector alone: a
module of one's own stands between them and the language model.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from luthier.errors import RecipeError
from luthier.methods.architectures.vision.vision_language import VisionLanguage
from luthier.model.images import install
from luthier.registry import family
from luthier.text.images import Images, VisionRenderer

if TYPE_CHECKING:
    from luthier.model.network import Network


@family
class Aggregated(VisionLanguage):
    """Family: image features out of the tower by a module of its own, `aggregator`, beside the network."""

    def suits(self, config: Any) -> bool:
        return False  # it is named

    def pictures(self, path: str) -> Images:
        """What reads the image files of the model in a folder or of a hub name."""
        raise NotImplementedError

    def modules(self, model: Any) -> dict[str, nn.Module]:
        """The modules that this architecture adds to a network: `aggregator`, and perhaps further towers."""
        raise NotImplementedError

    def features(self, model: Any, pixels: Tensor) -> Tensor:
        """[R, ...] pixels -> [R, tokens, width of the language model]."""
        raise NotImplementedError

    def new(self, model: Any) -> list[str]:
        """Names of the modules within `modules` that no checkpoint of others has."""
        return ["aggregator"]

    def renderer(self, tokenizer: Any, config: Any, **how: Any) -> VisionRenderer:
        return VisionRenderer(tokenizer, self.pictures(config._name_or_path), **how)

    def load(self, path: str, **kwargs: Any) -> Network:
        images = self.pictures(path)
        model: Any = super(VisionLanguage, self).load(path, **kwargs)
        if not hasattr(model.base_model, "vision_tower") or not hasattr(model, "get_image_features"):
            raise RecipeError(
                f"architecture '{self.name}' is for networks with a vision tower, such as LLaVA, and"
                f" {type(model).__name__} has none"
            )
        weight = model.get_input_embeddings().weight
        for name, module in self.modules(model).items():
            model.add_module(name, module.to(weight.device, weight.dtype))
        if not read_modules(path, model, [*self.modules_of(model)]):
            model.fresh = [*model.fresh, *self.new(model)]

        def get_image_features(_: Any, pixel_values: Tensor, **rest: Any) -> BaseModelOutputWithPooling:
            features: Any = list(self.features(model, pixel_values))
            return BaseModelOutputWithPooling(pooler_output=features)

        for owner in (model, model.base_model):
            owner.get_image_features = MethodType(get_image_features, owner)
        install(model, images)
        return model

    def modules_of(self, model: Any) -> dict[str, str]:
        """Names of what was added -> "projector" or "vision_tower"."""
        return {"aggregator": "projector"}

    def image_parts(self, model: Network) -> dict[str, str]:
        return {**super().image_parts(model), **self.modules_of(model)}


def read_modules(path: str, model: nn.Module, names: list[str]) -> bool:
    """Give modules the weights that a checkpoint's folder has for them. Has it any?"""
    from safetensors import safe_open

    state = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                if key.startswith(tuple(f"{name}." for name in names)):
                    state[key] = tensors.get_tensor(key)
    with torch.no_grad():
        for key, value in state.items():
            model.get_parameter(key).copy_(value)
    return bool(state)
