"""The bridge to PEFT: every Delta as a PEFT type, and any PEFT type on a model. All use of PEFT's internals
is here.

Importing it registers all Deltas, so that `PeftModel.from_pretrained` and `transformers.load_adapter` know
them (compat/peft.py triggers the import). Method files import it only inside `attach`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners._peft.foreign import NOTES, PREFIX, VECTORS, any_config, place, type_of
from luthier.methods.tuners._peft.io import plain_state, prompt_config, write_prompt
from luthier.methods.tuners._peft.layer import ADAPTER, INITIAL, DeltaLayer, DeltaParams, sideways
from luthier.methods.tuners._peft.prompts import attach_prompt, prompt_module
from luthier.methods.tuners._peft.registration import (
    config_for,
    config_of,
    plain_settings,
    register,
    register_one,
)
from luthier.methods.tuners._peft.starts import start_warnings
from luthier.methods.tuners._peft.trial import merges
from luthier.methods.tuners._peft.tuned import PeftTunedModel

if TYPE_CHECKING:
    from luthier.methods.tuners._base import TunedModel
    from luthier.model.network import Network

__all__ = [
    "ADAPTER",
    "INITIAL",
    "DeltaLayer",
    "DeltaParams",
    "PeftTunedModel",
    "any_config",
    "attach",
    "attach_type",
    "config_for",
    "config_of",
    "merges",
    "plain_settings",
    "plain_state",
    "prompt_config",
    "prompt_module",
    "register",
    "register_one",
    "sideways",
    "write_prompt",
]


def attach(settings: Delta, model: Network) -> PeftTunedModel:
    """A Delta put on a model, in place."""
    return PeftTunedModel(settings, model, config_for(settings, model))


def attach_type(settings: Any, config: Any, model: Network) -> TunedModel:
    """A type of PEFT's own put on a model, in place, under a copy of PEFT's config of it."""
    config = copy.deepcopy(config)
    if type_of(config) in VECTORS | {PREFIX}:
        return attach_prompt(settings, config, model)
    fresh = getattr(model, "fresh", ())
    if fresh and hasattr(config, "modules_to_save"):  # a new head is trained along
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *fresh})
    place(config, model)
    attached = PeftTunedModel(settings, model, config)
    attached.warnings += start_warnings(config, attached.layers.values())
    if note := NOTES.get(type_of(config)):
        attached.warnings += (note,)
    return attached
