"""The bridge to PEFT: every Delta as a PEFT type, and any PEFT type on a model. All use of PEFT's internals
is here.

Importing it registers all Deltas, so that `PeftModel.from_pretrained` and `transformers.load_adapter` know
them (compat/peft.py triggers the import). Method files import it only inside `attach`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners._peft.foreign import any_config, merges
from luthier.methods.tuners._peft.io import plain_state, write_prompt
from luthier.methods.tuners._peft.layer import ADAPTER, INITIAL, DeltaLayer, DeltaParams, sideways
from luthier.methods.tuners._peft.registration import (
    config_for,
    config_of,
    plain_settings,
    register,
    register_one,
)
from luthier.methods.tuners._peft.tuned import PeftTunedModel

if TYPE_CHECKING:
    from luthier.model.network import Network

__all__ = [
    "ADAPTER",
    "INITIAL",
    "DeltaLayer",
    "DeltaParams",
    "PeftTunedModel",
    "any_config",
    "attach",
    "config_for",
    "config_of",
    "merges",
    "plain_settings",
    "plain_state",
    "register",
    "register_one",
    "sideways",
    "write_prompt",
]


def attach(settings: Delta, model: Network) -> PeftTunedModel:
    """A Delta put on a model, in place."""
    return PeftTunedModel(settings, model, config_for(settings, model))
