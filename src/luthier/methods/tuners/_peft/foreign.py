"""PEFT's own tuner types by name: their configs, checked before a model is loaded, and where they sit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from peft.utils.peft_types import PeftType

from luthier.compat.peft import name_all_linear
from luthier.errors import RecipeError
from luthier.methods.tuners._peft.registration import register
from luthier.methods.tuners._peft.targets import (
    as_list,
    check_where,
    ends_one,
    first_line,
    modules_in_layers,
    only_ends,
)
from luthier.registry import did_you_mean

if TYPE_CHECKING:
    from luthier.model.network import Network

UNSUPPORTED = {  # tuners of PEFT that need more of a run than layers in a model
    "ADALORA": (
        "its rank allocator must be stepped and its regulariser added to the loss; use tuner 'adalora'"
    ),
    "XLORA": "it mixes trained adapters through the forward of PeftModel",
    "POLY": "it needs a task id with every batch",
    "MULTITASK_PROMPT_TUNING": "it needs a task id with every batch; use tuner 'prompt' for one task",
    "ADAPTION_PROMPT": "it replaces attention modules, which the packed layout relies on",
    "SHADOW": "it runs a second network inside the forward of PeftModel",
    "CARTRIDGE": "its keys and values are computed from a document by PEFT's own code; use tuner 'prefix'",
    "CPT": "it weights the loss of examples inside its prompt by PEFT's own forward; use tuner 'prompt'",
}
NOTES = {  # what a run with a type says
    "LILY": (
        "type lily averages its router over all tokens that are computed together, so its answers depend on"
        " what else is in a batch"
    ),
}
# vectors before the text: what luthier's own layouts put there is saved as PEFT's
VECTORS, PREFIX = {"PROMPT_TUNING", "P_TUNING"}, "PREFIX_TUNING"
# types that are not for linear modules at large: PEFT lists their modules by kind of network
OWN_MODULES = {"BEFT", "IA3", "LN_TUNING"}
LAYER_SETTINGS = ("layers_to_transform", "layers_pattern")


def type_of(config: PeftConfig) -> str:
    """PEFT's name of the type, in capitals."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def any_config(name: str, settings: Mapping[str, Any]) -> PeftConfig:
    """PEFT's own config of a type, checked. Raises RecipeError for an unknown type or setting, and for what
    cannot work here.
    """
    register()
    kinds = {k.value: k for k in PEFT_TYPE_TO_CONFIG_MAPPING}
    key = name.upper()
    if key not in kinds:
        raise RecipeError(f"type: PEFT has no '{name}'{did_you_mean(key, kinds).lower()}")
    if key in UNSUPPORTED:
        raise RecipeError(f"type: {name} cannot be used here: {UNSUPPORTED[key]}")
    if key.startswith("LUTHIER_"):
        raise RecipeError(
            f"type: {name} is one of luthier's own tuners; write `tuner:"
            f" {key.removeprefix('LUTHIER_').lower()}`"
        )
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kinds[key]]
    allowed = [f.name for f in fields(cls)]
    for k in settings:
        if k not in allowed:
            raise RecipeError(f"config: PEFT's {cls.__name__} has no setting '{k}'{did_you_mean(k, allowed)}")
    _check_start(key, settings)
    settings = dict(settings)
    later = {}  # what PEFT refuses beside a regular expression, and `place` carries out
    if isinstance(settings.get("target_modules"), str) and settings.get("layers_to_transform") is not None:
        later = {k: settings.pop(k) for k in LAYER_SETTINGS if k in settings}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = cls(**settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"config: {first_line(error)}") from None
    for setting, value in later.items():
        setattr(config, setting, value)
    return config


def _check_start(key: str, settings: Mapping[str, Any]) -> None:
    """Settings of how a type begins that luthier leaves to tuners of its own."""
    start = settings.get("init_lora_weights", True)
    if key == "LORA" and start not in (True, "gaussian", "orthogonal"):
        raise RecipeError(
            f"config: init_lora_weights {start} changes the base weights or needs data; use tuner 'lora'"
        )
    if key in VECTORS | {PREFIX} and not settings.get("num_virtual_tokens"):
        raise RecipeError("config: num_virtual_tokens says how many vectors stand before the text; give it")
    if str(settings.get("prompt_tuning_init", "")).upper() == "TEXT":
        raise RecipeError("config: use tuner 'prompt' with prompt_tuning_init: text")
    if key == "TRAINABLE_TOKENS" and not settings.get("token_indices"):
        raise RecipeError("config: token_indices names no tokens; list those whose embeddings are trained")


def place(config: PeftConfig, model: Network) -> None:
    """Decide which modules of a network a type sits on, in place: those that are named, else PEFT's for this
    type and kind of network, else all linear modules. Raises RecipeError where a type has modules of its own
    and PEFT does not know them.
    """
    kind = type_of(config)
    if not hasattr(config, "target_modules") or kind == "TRAINABLE_TOKENS":
        return
    check_where("peft", config)
    usual = _usual_modules(config)
    network = getattr(model.config, "model_type", "")
    named = config.target_modules is not None or getattr(config, "target_parameters", None)
    if not named and not usual.get(network):
        if kind in OWN_MODULES:
            raise RecipeError(
                f"type: PEFT does not know where {kind.lower()} sits in {type(model).__name__}; name the"
                " modules in config: {target_modules: [...]}"
            )
        config.target_modules = "all-linear"
    if kind == "LORA" and not named:  # PEFT loses its usual modules where experts are one tensor
        config.target_modules = as_list(usual.get(network)) or config.target_modules
    target = usual.get(network) if config.target_modules is None else config.target_modules
    if target and getattr(config, "layers_to_transform", None) is not None:
        layers = as_list(config.layers_to_transform)
        inside = modules_in_layers("peft", target, layers, config, model)
        if not only_ends(target, model):
            config.target_modules = set(inside)
            config.layers_to_transform = config.layers_pattern = None
    if kind == "IA3":
        _fit_feedforward(config, model)


def _usual_modules(config: Any) -> Mapping[str, Any]:
    """Kind of network -> the modules that PEFT chooses for a type."""
    if type_of(config) == "IA3":
        return TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    return getattr(PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)], "target_module_mapping", {})


def _fit_feedforward(config: Any, model: Network) -> None:
    """(IA)3 scales what its feed-forward modules read and what the others compute. PEFT takes the former from
    its table; a saved adapter is only read where they are among the targets.
    """
    if config.feedforward_modules is not None or config.target_modules is None:
        return
    network = getattr(model.config, "model_type", "")
    usual = as_list(TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(network))
    name_all_linear(config, model)
    if isinstance(config.target_modules, str):
        return
    among = set()
    for target in config.target_modules:
        if any(ends_one(name, [target]) or ends_one(target, [name]) for name in usual):
            among.add(target)
    config.feedforward_modules = among
