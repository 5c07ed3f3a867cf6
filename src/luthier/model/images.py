"""Images that a network reads: where its embedding is handed numbers of patches (text/images.py), the
features of these patches come out, computed by the network's own tower and projector.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.text.images import FIRST, PATCH, Images

if TYPE_CHECKING:
    from luthier.model.network import Network

TOWER = re.compile(r"vision|visual|tower|image_encoder", re.IGNORECASE)
CACHED = 512  # images whose features stay in memory while nothing moves that they depend on


class ImageReader(nn.Module):
    """Puts features of images in the places of their patches. `fixed`: nothing moves that features depend on,
    so they are computed once.
    """

    def __init__(self, model: Network, images: Images):
        super().__init__()
        self._model = (model,)  # in a tuple, since it must not be a submodule: it would contain itself
        self.images = images
        self.fixed = False
        self.features: OrderedDict[int, Tensor] = OrderedDict()
        self.patches: Tensor | None = None  # of the call that goes on: what its embedding was handed

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hand the embedding a token that it has, where a patch stands."""
        ids, *rest = inputs
        where = ids >= FIRST
        if not where.any():
            return None
        self.patches = ids
        return (ids.masked_fill(where, self.images.token_id), *rest)

    def after(self, module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
        """Put features in the places of patches."""
        ids, self.patches = self.patches, None
        if ids is None:
            return embedded
        where = ids >= FIRST
        codes = ids[where] - FIRST
        every, which = (codes >> PATCH).unique(return_inverse=True)
        features = self.read(every.tolist())
        starts = torch.tensor([0, *(len(f) for f in features)], device=ids.device).cumsum(0)
        places = starts[which] + (codes & ((1 << PATCH) - 1))
        values = torch.cat(features)[places].to(embedded.dtype)
        return embedded.masked_scatter(where[..., None], values)

    def read(self, numbers: list[int]) -> list[Tensor]:
        """The features [patches, width] of images."""
        if not self.fixed:
            self.features.clear()
            return self.compute(numbers)
        missing = [number for number in numbers if number not in self.features]
        if missing:
            with torch.no_grad():
                self.features.update(zip(missing, self.compute(missing), strict=True))
        read = [self.features[number] for number in numbers]
        while len(self.features) > CACHED:
            self.features.popitem(last=False)
        return read

    def compute(self, numbers: list[int]) -> list[Tensor]:
        """As `read`, by the network: images of one shape together."""
        groups: dict[tuple, list[int]] = {}
        for i, number in enumerate(numbers):
            shapes = tuple((name, x.shape) for name, x in self.images.inputs(number).items())
            groups.setdefault(shapes, []).append(i)
        features: dict[int, Tensor] = {}
        for places in groups.values():
            inputs = [self.images.inputs(numbers[i]) for i in places]
            features.update(zip(places, self.compute_alike(inputs), strict=True))
        return [features[i] for i in range(len(numbers))]

    def compute_alike(self, inputs: list[dict[str, Tensor]]) -> list[Tensor]:
        """The features of images whose pixels have one shape."""
        weight: Tensor = cast(Any, self._model[0]).get_input_embeddings().weight
        joint: dict[str, Tensor] = {}
        for name in inputs[0]:
            value = torch.cat([each[name] for each in inputs]).to(weight.device)
            joint[name] = value.to(weight.dtype) if value.is_floating_point() else value
        read: Any = cast(Any, self._model[0]).get_image_features(**joint)
        features = getattr(read, "pooler_output", read)
        return [each.flatten(0, -2) for each in features]


def install(model: Network, images: Images) -> None:
    """Let a network's embedding read numbers of patches."""
    reader = ImageReader(model, images)
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(reader.before, prepend=True)
    embedding.register_forward_hook(reader.after)
    model.image_reader = reader


def reader_of(model: Network) -> ImageReader:
    """What `install` gave a network."""
    return cast(ImageReader, model.get_submodule("image_reader"))


def parts_of(model: Network) -> dict[str, str]:
    """The names of a network's modules that images pass: name -> "vision_tower" or "projector"."""
    prefix = str(model.base_model_prefix)
    base = model.get_submodule(prefix)
    embedding = model.get_input_embeddings()
    parts = {}
    for name, module in base.named_children():
        if not any(inner is embedding for inner in module.modules()):
            kind = "vision_tower" if TOWER.search(name) else "projector"
            parts[f"{prefix}.{name}"] = kind
    if not parts:
        raise RecipeError(f"{type(model).__name__} has no tower for images that can be told from the rest")
    return parts


@torch.no_grad()
def reading_gap(model: Network) -> float:
    """How much the log-probabilities behind an image differ, on average over the vocabulary, between the
    network's own forward with its processor's tokens and pixels, and its reading of numbered patches.
    """
    images = reader_of(model).images
    device = model.get_input_embeddings().weight.device
    ids, processed = images.try_out()
    inputs = {}
    for name, value in processed.items():
        value = value.to(device)
        inputs[name] = value.to(model.dtype) if value.is_floating_point() else value
    own = model(**inputs, use_cache=False).logits[0, -1]
    read = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
    return float((own.float().log_softmax(-1) - read.float().log_softmax(-1)).abs().mean())
