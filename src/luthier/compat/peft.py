"""PEFT's table of types: our tuners become members of it, and leave it again.

PeftType is a closed enum and `register_peft_method` insists on a member of it, so a member is added by hand.
Within a run the types that it uses are registered and taken back at its end. `register_peft()` makes all of
them known for good: for plain PEFT to load what luthier saved. Two functions of PEFT's own are
used as they are: `name_all_linear` turns all-linear of a config into names, `fit_prompt_config` fills in the
sizes of a prompt.
"""

from __future__ import annotations

import warnings
from importlib import import_module

from peft import mapping
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as name_all_linear
from peft.utils import peft_types
from peft.utils.other import _prepare_prompt_learning_config as fit_prompt_config
from peft.utils.peft_types import PeftType, register_peft_method

from luthier import compat

__all__ = ["add_type", "fit_prompt_config", "name_all_linear", "register_peft", "register_type"]

TUNERS = "luthier.methods.tuners._peft"  # whose `register` makes every Delta known


def add_type(name: str, config: type, model: type, prefix: str) -> None:
    """Make a tuner a PEFT type; taken back at the end of a run.

    name: luthier_<tuner>. prefix: of its tensors' names.
    """
    key = name.upper()
    if key in PeftType.__members__:
        return
    member = str.__new__(PeftType, key)
    member._name_ = member._value_ = key
    member.__objclass__, member._sort_order_ = PeftType, len(PeftType)
    type.__setattr__(PeftType, key, member)
    PeftType._member_names_.append(key)
    PeftType._member_map_[key] = PeftType._value2member_map_[key] = member
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=prefix)
    compat.on_exit(lambda: remove_type(key))


def remove_type(key: str) -> None:
    """Leave PEFT as it was before `add_type`."""
    member = PeftType._member_map_.pop(key)
    PeftType._value2member_map_.pop(key)
    PeftType._member_names_.remove(key)
    type.__delattr__(PeftType, key)
    for table in tables():
        table.pop(member, None)


def tables() -> list[dict]:
    """PEFT's mappings from a type to its classes."""
    tables_by_id = {}
    for module in (mapping, peft_types):
        for name, value in vars(module).items():
            if name.startswith("PEFT_TYPE_TO_") and isinstance(value, dict):
                tables_by_id[id(value)] = value
    return list(tables_by_id.values())


def register_type(peft_type: str) -> None:
    """Make one of our tuners known, by the `peft_type` of its adapter_config.json; not PEFT's own."""
    name = peft_type.lower().removeprefix("luthier_")
    if name != peft_type.lower():
        import_module(TUNERS).register_one(name)


def register_peft() -> None:
    """Make every tuner of luthier known to PEFT in this process, for good: then `PeftModel.from_pretrained`
    loads what luthier saved.
    """
    try:
        import_module(TUNERS).register()
    except Exception as error:
        warnings.warn(
            f"luthier's adapters could not be registered with PEFT in this process: {error}", stacklevel=2
        )
