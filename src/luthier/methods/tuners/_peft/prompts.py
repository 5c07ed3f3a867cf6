"""PEFT's types of vectors before the text, put there by luthier's own layouts and saved as PEFT's."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file
from torch import Tensor

from luthier.compat.peft import fit_prompt_config
from luthier.errors import RecipeError
from luthier.methods.tuners._base import ParamGroup, TunedModel
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners._peft.foreign import PREFIX, type_of
from luthier.methods.tuners._peft.io import write_adapter
from luthier.methods.tuners._peft.layer import ADAPTER
from luthier.methods.tuners._peft.module import hand_over
from luthier.methods.tuners._peft.registration import config_for
from luthier.methods.tuners._peft.targets import first_line
from luthier.methods.tuners._peft.tuned import PeftTunedModel
from luthier.registry import build
from luthier.storage import checkpoints

if TYPE_CHECKING:
    from luthier.model.network import Network

FILE = "adapter_model.safetensors"


def prompt_module(tuned: TunedModel, config: Any, encoder: Any = None) -> Any:
    """A PeftModel that puts a tuned model's own vectors, or what its encoder computes, before the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        peft: Any = get_peft_model(tuned.model, config)
    if encoder is None:
        vectors = next(iter(tuned.parameters().values()))
        peft.prompt_encoder[ADAPTER].embedding.weight = vectors
    else:
        peft.prompt_encoder[ADAPTER] = encoder
    return hand_over(tuned, peft)


def attach_prompt(settings: Any, config: Any, model: Network) -> TunedModel:
    """PROMPT_TUNING, P_TUNING or PREFIX_TUNING on a model. Raises RecipeError where its network cannot."""
    config.task_type = config.task_type or "CAUSAL_LM"
    config.num_transformer_submodules = config.num_transformer_submodules or 1
    try:
        config = fit_prompt_config(config, model.config)
    except ValueError as error:
        raise RecipeError(f"tuner 'peft' on {type(model).__name__}: {first_line(error)}") from None
    if type_of(config) == PREFIX:
        return PrefixTuning(settings, model, config)
    return EncodedPrompt(settings, model, config)


class EncodedPrompt(TunedModel):
    """Vectors that a prompt encoder of PEFT computes, from its own embeddings."""

    def __init__(self, settings: Any, model: Network, config: Any):
        super().__init__(settings, model.requires_grad_(False))
        words = model.get_input_embeddings()
        kind: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
        inputs = (config, words) if type_of(config) == "PROMPT_TUNING" else (config,)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.encoder: Any = kind(*inputs).float().to(words.weight.device)
        self.config, self.virtual = config, config.num_virtual_tokens

    def soft(self):
        vectors = torch.arange(self.config.num_virtual_tokens, device=self.encoder.embedding.weight.device)
        return self.encoder(vectors[None])[0]

    def all_param_groups(self):
        return [ParamGroup("prompt", dict(self.encoder.named_parameters()), self.settings)]

    @contextmanager
    def off(self) -> Iterator[None]:
        virtual, self.virtual = self.virtual, 0
        try:
            yield
        finally:
            self.virtual = virtual

    def module(self):
        return prompt_module(self, self.config, self.encoder)

    def save(self, folder):
        config = _for_reading(self.config)
        with torch.no_grad():
            write_adapter(Path(folder), {"prompt_embeddings": self.soft()}, config, self.model)

    def read(self, folder):
        vectors = _saved_vectors(folder)
        if vectors is None:
            return super().read(folder)
        if type_of(self.config) != "PROMPT_TUNING":
            raise RecipeError(
                f"the adapter in {folder} holds what its encoder computed and not the encoder; start from the"
                " folder of its run"
            )
        return {"prompt.embedding.weight": vectors}


class PrefixTuning(PeftTunedModel):
    """Keys and values before the text, placed by tuner `prefix` and saved as PEFT's PREFIX_TUNING.

    PEFT counts the text's positions from the end of the prefix, luthier from 0. Under rotary positions that
    is a rotation of the prefix's keys, by as many positions as it has; other networks are refused.
    """

    def __init__(self, settings: Any, model: Network, config: Any):
        prefix: Delta = build(
            "tuner",
            {
                "name": "prefix",
                "num_virtual_tokens": config.num_virtual_tokens,
                "prefix_projection": config.prefix_projection,
                "encoder_hidden_size": config.encoder_hidden_size,
            },
        )
        self.prefix_config, self.rotary = config, _rotary(model, config)
        super().__init__(prefix, model, config_for(prefix, model))
        self.settings = settings

    def rotated(self, keys: Tensor, by: int) -> Tensor:
        """[n, width] keys, as they are so many positions on."""
        embed, rotate = self.rotary
        heads = keys.float().view(len(keys), self.prefix_config.num_attention_heads, -1)
        place = torch.full((1, 1), by, device=keys.device)
        cos, sin = embed(heads[None], place)
        scale = float(getattr(embed, "attention_scaling", 1.0))
        turned, _ = rotate(heads[None].transpose(1, 2), heads[None].transpose(1, 2), cos / scale, sin / scale)
        return turned[0].transpose(0, 1).reshape(keys.shape)

    def save(self, folder):
        by_layer = []
        with torch.no_grad():
            for layer in self.layers.values():
                keys, values = layer.prefix_kv()
                by_layer += [self.rotated(keys, len(keys)), values.float()]
        state = {"prompt_embeddings": torch.cat(by_layer, 1)}
        write_adapter(Path(folder), state, _for_reading(self.prefix_config), self.model)

    def read(self, folder):
        vectors = _saved_vectors(folder)
        if vectors is None:
            return TunedModel.read(self, folder)
        if self.prefix_config.prefix_projection:
            raise RecipeError(
                f"the adapter in {folder} holds what its projection computed and not the projection; start"
                " from the folder of its run"
            )
        state, by_layer = {}, vectors.chunk(2 * len(self.layers), 1)
        for i, name in enumerate(self.layers):
            state[f"{name}.keys"] = self.rotated(by_layer[2 * i], -len(vectors))
            state[f"{name}.values"] = by_layer[2 * i + 1]
        return state


def _rotary(model: Any, config: Any) -> tuple[Any, Any]:
    """What makes a network's rotary positions, and what turns queries and keys by them. Raises RecipeError
    where there is none, or it does not turn whole heads.
    """
    inner = getattr(model, model.base_model_prefix, model)
    embed = getattr(inner, "rotary_emb", None)
    rotate = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    heads = config.token_dim // config.num_attention_heads
    whole = embed is not None and rotate is not None
    if not whole or 2 * len(getattr(embed, "inv_freq", ())) != heads:
        raise RecipeError(
            "type: prefix_tuning counts the text's positions from the end of the prefix, which"
            f" {type(model).__name__} cannot follow here; use tuner 'prefix'"
        )
    return embed, rotate


def _for_reading(config: PeftConfig) -> PeftConfig:
    """A copy that PEFT reads for inference."""
    copied = copy.deepcopy(config)
    copied.inference_mode = True
    return copied


def _saved_vectors(folder: Any) -> Tensor | None:
    """What an adapter file holds; None where a run's checkpoint is to be read."""
    path = Path(folder) / FILE
    if checkpoints.paths(Path(folder)) or not path.is_file():
        return None
    return load_file(str(path))["prompt_embeddings"]
