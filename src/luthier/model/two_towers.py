"""Pairs of towers that put texts and images into one space (CLIP and its kin of transformers), frozen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.compat.lazy_imports import import_models
from luthier.errors import RecipeError


class TwoTowers:
    """Texts and images as unit vectors [N, E]."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any):
        self.model, self.tokenizer, self.processor = model.eval().requires_grad_(False), tokenizer, processor

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Each text by itself, so that none depends on the others."""
        vectors = []
        for text in texts:
            inputs = self.tokenizer(text, truncation=True, return_tensors="pt")
            vectors.append(features_of(self.model.get_text_features(**inputs)))
        return F.normalize(torch.cat(vectors).float(), dim=-1)

    @torch.no_grad()
    def images(self, images: Sequence[Any]) -> Tensor:
        """PIL images, read together."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return F.normalize(features_of(self.model.get_image_features(pixel_values=pixels)).float(), dim=-1)

    def names(self, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """[names, E] the direction of the mean over prompts, in which {} stands for the name."""
        vectors = []
        for name in names:
            texts = [prompt.replace("{}", name) for prompt in prompts]
            vectors.append(self.texts(texts).mean(0))
        return F.normalize(torch.stack(vectors), dim=-1)


@lru_cache(maxsize=4)
def two_towers_of(path: str) -> TwoTowers:
    """The towers in a folder or of a hub name. Raises RecipeError where there are none that can be read."""
    import_models()
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        kind = type(AutoConfig.from_pretrained(path, trust_remote_code=False))
        network = AutoModel._model_mapping[kind]  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(path, error) from None
    if not (hasattr(network, "get_text_features") and hasattr(network, "get_image_features")):
        raise RecipeError(f"clip: {path} is a {network.__name__}, which has no tower for texts and images")
    try:
        model = AutoModel.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        raise unreadable(path, error) from None
    return TwoTowers(model, tokenizer, processor)


def unreadable(path: str, error: Exception) -> RecipeError:
    reason = " ".join(str(error).split())[:160]
    return RecipeError(f"clip: {path} cannot be read: {reason}")


def features_of(read: Any) -> Tensor:
    """[N, E] of what a tower says, whichever way this version of transformers says it."""
    return getattr(read, "pooler_output", read)
