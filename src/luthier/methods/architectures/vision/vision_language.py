"""Vision-language models: a tower reads images, a projector makes tokens of them, a decoder writes text
(LLaVA, SmolVLM and Idefics3, and others of transformers' image-text-to-text models).

An image is a run of numbers among a row's tokens, one for each patch, so all that the decoder-only
architecture does (packing, prefixes read once, prompts shared by completions, caches) holds for rows with
images; nothing else changes, and every objective, reward and stage works. Images of one step are read
together, each once; where neither tower nor projector is trained, features of 512 images are kept.

`parts` says what `target_modules: all-linear` reaches: the language model alone by default, as in other
tools. Whether a network reads an image so is tried out when it is loaded: what its own forward says of an
image must come out. That refuses models whose positions are an image's rows and columns, or in which the
tokens of an image see each other (Qwen-VL, Gemma 3 and PaliGemma, as their code reads). Tested are LLaVA and
Idefics3.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from luthier.errors import RecipeError
from luthier.kernels.tolerance import logprob_tolerance
from luthier.methods.architectures._base import (
    ANSWER_TOKENS,
    EMBEDDINGS,
    ENTROPY,
    FIXED_TARGETS,
    GENERATE,
    HIDDEN,
    LOGPROBS,
    SOFT_PROMPTS,
    TOPK,
)
from luthier.methods.architectures.text.causal import Causal
from luthier.model.images import install, parts_of, reader_of, reading_gap
from luthier.registry import architecture
from luthier.text.images import VisionRenderer, images_of

if TYPE_CHECKING:
    from luthier.model.network import Network

_fixed: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # attached tuner -> does it leave images alone?


@architecture(
    row="cddm-tri-lora",
    provides=[
        LOGPROBS,
        ENTROPY,
        TOPK,
        HIDDEN,
        GENERATE,
        EMBEDDINGS,
        FIXED_TARGETS,
        SOFT_PROMPTS,
        ANSWER_TOKENS,
    ],
    use_when="the model reads images and writes text: LLaVA, SmolVLM, Idefics3 and similar models; rows have"
    " `images`. It is selected automatically.",
    costs="images are read once a step; where tower and projector are not trained, 512 are kept.",
    covers="low-rank updates of tower, projector and language model at once (`parts`), against the language"
    " model alone where the frozen parts pass no image on; merged, the answers are the same.",
    omits="the photos of crops and their questions, the judge of free answers, Qwen-VL.",
    tests=[
        "methods/architectures/vision/test_vision_language.py::test_low_rank_updates_of_all_parts",
    ],
)
class VisionLanguage(Causal):
    """A transformers image-text-to-text model with a decoder."""

    # what `target_modules: all-linear` reaches; tuners that name their modules are not limited
    parts: tuple[Literal["vision_tower", "projector", "language_model"], ...] = ("language_model",)

    def suits(self, config: Any) -> bool:
        from transformers.models.auto import modeling_auto as auto

        ours = {*auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
        others = {
            *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
            *auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(),
            *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
        }
        return any(n in ours - others for n in config.architectures or ())

    def auto_class(self) -> Any:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText

    def renderer(self, tokenizer: Any, config: Any, **how: Any) -> VisionRenderer:
        return VisionRenderer(tokenizer, images_of(config._name_or_path), **how)

    def load(self, path: str, **kwargs: Any) -> Network:
        model = super().load(path, **kwargs)
        install(model, images_of(path))
        return model

    def check_network(self, model: Network) -> None:
        gap = reading_gap(model)
        if not gap <= logprob_tolerance(model):
            raise RecipeError(
                f"architecture vision_language: {type(model).__name__} does more with an image than to read"
                " its patches in the places of tokens (positions by rows and columns, attention among them),"
                f" so its tokens would be read otherwise (log-probabilities differ by {gap:.1e})"
            )

    def left_out(self, model: Network) -> str | None:
        parts = self.image_parts(model)
        patterns = [under(name) for name, kind in parts.items() if kind not in self.parts]
        if "language_model" not in self.parts:
            patterns.append(rf"(?!{'|'.join(map(under, parts))}$).*")
        return "|".join(patterns) or None

    def image_parts(self, model: Network) -> dict[str, str]:
        """The names of the modules that images pass: name -> "vision_tower" or "projector"."""
        return parts_of(model)

    def forward(self, model, attached, batch):
        self.announce(model, attached)
        return super().forward(model, attached, batch)

    def plain(self, model, attached, batch):
        self.announce(model, attached)
        return super().plain(model, attached, batch)

    def writer(self, model, attached):
        self.announce(model, attached)
        return super().writer(model, attached)

    def announce(self, model: Network, attached: Any) -> None:
        """Tell the network whether features of images stay as they are."""
        if attached not in _fixed:
            pixels = {
                id(p) for name in self.image_parts(model) for p in model.get_submodule(name).parameters()
            }
            _fixed[attached] = not any(id(p) in pixels for p in attached.parameters().values())
        reader_of(model).fixed = _fixed[attached]


def under(name: str) -> str:
    """A regular expression of a module and all in it."""
    return rf"{re.escape(name)}(\..*)?"
