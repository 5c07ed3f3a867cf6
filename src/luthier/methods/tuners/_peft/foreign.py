"""PEFT's own tuner types by name: their configs, checked before a model is loaded, and which of them can be
merged.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType

from luthier.errors import RecipeError
from luthier.methods.tuners._peft.registration import register
from luthier.methods.tuners._peft.targets import first_line
from luthier.registry import did_you_mean

UNSUPPORTED = {  # tuners of PEFT that need more of a run than layers in a model
    "ADALORA": (
        "its rank allocator must be stepped and its regulariser added to the loss; use tuner 'adalora'"
    ),
    "XLORA": "it mixes trained adapters through the forward of PeftModel",
    "POLY": "it needs a task id with every batch",
    "ADAPTION_PROMPT": "it replaces attention modules, which the packed layout relies on",
    "SHADOW": "it runs a second network inside the forward of PeftModel",
    "TRAINABLE_TOKENS": "it swaps the embedding module of the model",
}


def any_config(name: str, settings: Mapping[str, Any]) -> PeftConfig:
    """PEFT's own config of a type, checked. Raises RecipeError for an unknown type or setting, and for what
    cannot work here.
    """
    register()
    kinds = {k.value: k for k in PEFT_TYPE_TO_CONFIG_MAPPING}
    key = name.upper()
    if key not in kinds:
        raise RecipeError(f"type: PEFT has no '{name}'{did_you_mean(key, kinds).lower()}")
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kinds[key]]
    model = PEFT_TYPE_TO_TUNER_MAPPING[kinds[key]]
    if not (isinstance(model, type) and issubclass(model, BaseTuner)) and key not in UNSUPPORTED:
        raise RecipeError(
            f"type: {name} works inside PEFT's own forward, which packed batches do not go through; use tuner"
            " 'prompt'"
        )
    if key in UNSUPPORTED:
        raise RecipeError(f"type: {name} cannot be used here: {UNSUPPORTED[key]}")
    allowed = [f.name for f in fields(cls)]
    for k in settings:
        if k not in allowed:
            raise RecipeError(f"config: PEFT's {cls.__name__} has no setting '{k}'{did_you_mean(k, allowed)}")
    usual = {"target_modules": "all-linear"} if "target_modules" in allowed else {}
    start = settings.get("init_lora_weights", True)
    if key == "LORA" and start not in (True, "gaussian", "orthogonal"):
        raise RecipeError(
            f"config: init_lora_weights {start} changes the base weights or needs data; use tuner 'lora'"
        )
    if key.startswith("LUTHIER_"):
        raise RecipeError(
            f"type: {name} is one of luthier's own tuners; write `tuner:"
            f" {key.removeprefix('LUTHIER_').lower()}`"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(**{**usual, **settings})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"config: {first_line(error)}") from None


def merges(config: PeftConfig) -> bool:
    """Do the layers of this type write themselves into the weights?"""
    layer = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)].tuner_layer_cls
    kinds = layer if isinstance(layer, tuple) else (layer,)
    return all(_merger(k) is not BaseTunerLayer.merge for k in kinds)


def _merger(kind: type) -> Any:
    """`merge` of a layer class; of its Linear where the class itself is only a base."""
    below = [c for c in kind.__subclasses__() if "merge" in vars(c)]
    return below[0].merge if below else kind.merge
