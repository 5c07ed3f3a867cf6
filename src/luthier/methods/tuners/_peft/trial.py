"""Whether a type of PEFT's own merges: tried, not declared."""

from __future__ import annotations

import copy
import json
import warnings
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import PeftConfig
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.errors import RecipeError
from luthier.methods.tuners._peft.foreign import PREFIX, VECTORS, type_of
from luthier.methods.tuners._peft.tuned import PeftTunedModel

WIDTH = 256  # of the network that a merge is tried on: what most types' block sizes divide
# settings that say where a type sits in a certain network, which that of the trial is not
PLACES = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "feedforward_modules",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "layer_replication",
)
_merged: dict[str, bool] = {}  # settings -> what their trial came to


def merges(config: PeftConfig) -> bool:
    """Whether a type under these settings can be written into weights, tried on a small network. True where
    they do not fit that network: then the merge itself says what it cannot.
    """
    if type_of(config) in VECTORS | {PREFIX}:
        return False
    config = copy.deepcopy(config)
    usual: Any = type(config)()
    for setting in PLACES:
        if hasattr(config, setting):
            setattr(config, setting, getattr(usual, setting))
    if hasattr(config, "token_indices"):
        cast(Any, config).token_indices = [1]
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _merged:
        _merged[key] = _try_to_merge(config)
    return _merged[key]


def _try_to_merge(config: PeftConfig) -> bool:
    shape = LlamaConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_bias=True,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network: Any = LlamaForCausalLM(shape)
        try:
            attached = PeftTunedModel(SimpleNamespace(name="peft"), network, config)
        except RecipeError:
            return True
        try:
            with attached.merged():
                return True
        except RecipeError:
            return False
