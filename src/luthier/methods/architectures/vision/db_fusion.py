"""Depth-breadth fusion (Florence-VL, Chen et al., 2024): several feature maps of one image are joined along
their channels, and two layers make of each place one token for the language model.

The breadth is Florence-2, which reads the image with several prompts (`florence`): the states of its encoder
at the image's places, for a detailed caption, for text and for regions. The depth is what lies below: with
`florence` the map of its image encoder, by default the states of two layers of the network's own tower. All
maps have as many places, so an image costs as many tokens as with one of them. `join: tokens` (one map behind
the other) and `average` are the paper's ablations, as is leaving a prompt out or `depth: false`.

The network is a LLaVA-like one, whose own projector is read no more. Stage one of the paper trains all parts
(`parts`, or tuner `full`), stage two leaves the tower alone. Departs: nothing in the fusion itself.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
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
from luthier.methods.architectures.vision._aggregated import Aggregated
from luthier.registry import architecture
from luthier.text.images import Images

PROMPTS = (
    "Describe with a paragraph what is shown in the image.",
    "What is the text in the image?",
    "Locate the objects in the image, with their descriptions.",
)
Join = Literal["channels", "tokens", "average"]


@architecture(
    paper="arXiv:2412.04424",
    row="florence-vl-dbfusion",
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
    use_when="a vision-language model misses what one map of its tower does not hold, such as text or small"
    " objects, and images may not cost more tokens; its projector is trained anew.",
    costs="with `florence` its encoder reads an image once for each prompt; the language model reads as many"
    " tokens as with one map.",
    covers="maps of several prompts and of the image encoder, or of several layers of a tower, joined along"
    " channels by two layers, along tokens or by their average; branches that are left out.",
    omits="the paper's 27 million rows and its measurements; export as a merged model; checkpoints of the"
    " authors, whose type is their own.",
    tests=[
        "methods/architectures/vision/test_db_fusion.py::test_four_branches_cost_the_tokens_of_one",
        "methods/architectures/vision/test_db_fusion.py::test_a_branch_without_columns_is_not_seen",
        "methods/architectures/vision/test_db_fusion.py::test_florence_reads_an_image_by_every_prompt",
        "methods/architectures/vision/test_db_fusion.py::test_two_bits_need_two_branches",
    ],
)
class DBFusion(Aggregated):
    """A LLaVA-like network whose image tokens are several maps, joined."""

    florence: str | None = None  # a folder or hub name of a Florence-2; None: layers of the network's tower
    prompts: tuple[str, ...] = PROMPTS  # that Florence-2 reads an image with, a map each
    depth: bool = True  # the map of Florence-2's image encoder besides
    layers: tuple[int, ...] = (-2, -1)  # without `florence`: the layers of the tower, 0: its embeddings
    join: Join = "channels"  # how maps become one; tokens: a token for each map and place

    def __post_init__(self):
        count = len(self.prompts) + self.depth if self.florence else len(self.layers)
        if not count:
            raise RecipeError(
                "architecture 'db_fusion': there is no map; name a prompt, or layers of a tower"
            )

    def pictures(self, path: str) -> Images:
        count = len(self.prompts) + self.depth if self.florence else len(self.layers)
        return fused_images_of(path, self.florence, count if self.join == "tokens" else 1)

    def modules(self, model: Any) -> dict[str, nn.Module]:
        width = model.config.get_text_config().hidden_size
        if self.florence is None:
            widths = [model.base_model.vision_tower.config.hidden_size] * len(self.layers)
            return {"aggregator": Fusion(widths, width, self.join)}
        tower = FlorenceTower(self.florence, self.prompts, self.depth)
        return {"aggregator": Fusion(tower.widths, width, self.join), "florence_tower": tower}

    def modules_of(self, model: Any) -> dict[str, str]:
        parts = super().modules_of(model)
        return parts | {"florence_tower": "vision_tower"} if self.florence else parts

    def features(self, model: Any, pixels: Tensor) -> Tensor:
        if self.florence is not None:
            return model.aggregator(model.florence_tower(pixels))
        states = model.base_model.vision_tower(pixels, output_hidden_states=True).hidden_states
        skipped = int(model.config.vision_feature_select_strategy == "default")
        return model.aggregator([states[layer][:, skipped:] for layer in self.layers])


class Fusion(nn.Module):
    """Maps [R, N, d_i] -> [R, N, width]; with `tokens` [R, maps * N, width]."""

    def __init__(self, widths: list[int], width: int, join: Join = "channels"):
        super().__init__()
        if join != "channels" and len({*widths}) > 1:
            raise RecipeError(
                f"architecture 'db_fusion': maps of {', '.join(map(str, widths))} channels have no {join} in"
                " common; join channels"
            )
        self.join = join
        self.linear_1 = nn.Linear(sum(widths) if join == "channels" else widths[0], width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, maps: list[Tensor]) -> Tensor:
        if self.join == "channels":
            joined = torch.cat(maps, -1)
        elif self.join == "tokens":
            joined = torch.cat(maps, 1)
        else:
            joined = torch.stack(maps).mean(0)
        return self.linear_2(nn.functional.gelu(self.linear_1(joined)))


class FlorenceTower(nn.Module):
    """Florence-2 without its decoder: pixels -> a map [R, N, d] for each prompt, then that of the image
    encoder.
    """

    def __init__(self, path: str, prompts: tuple[str, ...], depth: bool):
        super().__init__()
        from transformers import AutoTokenizer, Florence2ForConditionalGeneration

        try:
            whole: Any = Florence2ForConditionalGeneration.from_pretrained(
                path, trust_remote_code=False
            ).model
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise unreadable(path, error) from None
        self.image_encoder, self.image_projector = whole.vision_tower, whole.multi_modal_projector
        self.encoder = whole.language_model.encoder
        self.prompts = [tokenizer(prompt).input_ids for prompt in prompts]
        self.depth = depth
        inner = whole.config.text_config.d_model
        self.widths = [inner] * len(prompts) + [whole.config.vision_config.embed_dim[-1]] * depth

    def forward(self, pixels: Tensor) -> list[Tensor]:
        low = self.image_encoder(pixels).last_hidden_state  # [R, d, H, W]
        places = self.image_projector(low)  # [R, 1 + N, D], the mean before the places
        table, maps = self.encoder.get_input_embeddings(), []
        for prompt in self.prompts:
            words = table(torch.tensor([prompt], device=pixels.device)).expand(len(pixels), -1, -1)
            inputs = torch.cat([places, words.to(places.dtype)], 1)
            mask = torch.ones(inputs.shape[:2], device=pixels.device)
            states = self.encoder(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
            maps.append(states[:, 1 : places.shape[1]])
        if self.depth:
            maps.append(low.flatten(2).transpose(1, 2))
        return maps


class FusedImages(Images):
    """Images whose places are those of a Florence-2, where there is one, several times each with `tokens`."""

    def __init__(self, processor: Any, florence: Any = None, places: int = 0, times: int = 1):
        super().__init__(processor)
        self.florence, self.places, self.times = florence, places, times

    def read(self, text: str, image: Any) -> dict[str, Any]:
        inputs = super().read(text, image)
        ids: list[int] = []
        row = inputs["input_ids"][0].tolist()
        count = (self.places or row.count(self.token_id)) * self.times
        for i, token in enumerate(row):
            if token != self.token_id:
                ids.append(token)
            elif self.token_id not in row[:i]:
                ids += [token] * count
        pixels = inputs["pixel_values"]
        if self.florence is not None:
            pixels = self.florence(images=[image], return_tensors="pt")["pixel_values"]
        return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}


@lru_cache(maxsize=8)
def fused_images_of(path: str, florence: str | None, times: int) -> FusedImages:
    """Raises RecipeError where a processor cannot be read."""
    from transformers import AutoConfig, AutoImageProcessor

    from luthier.text.images import images_of

    processor = images_of(path).processor
    if florence is None:
        return FusedImages(processor, times=times)
    try:
        config = AutoConfig.from_pretrained(florence, trust_remote_code=False)
        pixels = AutoImageProcessor.from_pretrained(florence, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise unreadable(florence, error) from None
    if config.model_type != "florence2":
        raise RecipeError(f"architecture 'db_fusion': florence: {florence} is a {config.model_type} model")
    high, wide = pixels.size["height"], pixels.size["width"]
    for stride in config.vision_config.patch_stride:
        high, wide = -(-high // stride), -(-wide // stride)
    return FusedImages(processor, pixels, high * wide, times)


def unreadable(path: str, error: Exception) -> RecipeError:
    reason = " ".join(str(error).split())[:160]
    return RecipeError(f"architecture 'db_fusion': florence: {path} cannot be read: {reason}")
