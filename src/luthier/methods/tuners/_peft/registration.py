"""Makes every Delta a PEFT type: its config class, its layer and model classes, and its member of
PeftType.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import field, fields, make_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from luthier.compat.peft import add_type
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners._peft.layer import DeltaLayer, DeltaModel
from luthier.methods.tuners._peft.targets import in_layers
from luthier.registry import classes, find

if TYPE_CHECKING:
    from luthier.model.network import Network

CLASSES: dict[type, tuple[type, type]] = {}  # Delta -> its PEFT config and model class


def plain_settings(settings: Any) -> dict[str, Any]:
    return {f.name: copy.copy(getattr(settings, f.name)) for f in fields(settings)}


def config_of(cls: type) -> type:
    """The PEFT config class of a Delta; registered with PEFT, for a run or for good."""
    if cls not in CLASSES:
        CLASSES[cls] = _make_classes(cls)
    config, model = CLASSES[cls]
    add_type(f"luthier_{cls.name}", config, model, model.prefix)
    return config


def _make_classes(cls: type) -> tuple[type, type]:
    """The PEFT config and model class of a Delta."""
    name, own = f"luthier_{cls.name}", [f.name for f in fields(cls)]
    slot = f"{name}_tensors"

    def finish(self) -> None:
        PeftConfig.__post_init__(self)
        self.peft_type = PeftType(name.upper())
        for k in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, k), (list, tuple)):
                setattr(self, k, set(getattr(self, k)))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules as a list of names")

    def settings(self) -> Any:
        values = {k: getattr(self, k) for k in own}
        return cls(**{k: sorted(v) if isinstance(v, set) else v for k, v in values.items()})

    columns = [(f.name, object, field(default=f.default)) for f in fields(cls)]
    methods = {"__post_init__": finish, "settings": settings}
    config = make_dataclass(f"{cls.__name__}Config", columns, bases=(PeftConfig,), namespace=methods)
    accept_former_settings(config, getattr(cls, "former_settings", {}))
    layer = type(f"{cls.__name__}Layer", (DeltaLayer,), {"slot": slot, "adapter_layer_names": (slot,)})
    model = type(f"{cls.__name__}Model", (DeltaModel,), {"prefix": slot, "tuner_layer_cls": layer})
    return config, model


def accept_former_settings(config: type, former: Mapping[str, str]) -> None:
    """Let a config class read adapters whose settings were saved under the names that they once had."""
    if not former:
        return
    init = config.__init__

    @wraps(init)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{former.get(name, name): value for name, value in kwargs.items()})

    config.__init__ = renamed


def config_for(settings: Any, model: Network) -> PeftConfig:
    """The PEFT config of a Delta's settings, for this network."""
    return config_of(type(settings))(**plain_settings(in_layers(settings, model)))


def register_one(name: str) -> None:
    """Make one tuner known to PEFT, by its name in recipes."""
    config_of(find("tuner", name))


def register() -> None:
    """Make every Delta known to PEFT. Another package's that cannot be imported is named in a warning and
    does not stop the others.
    """
    for cls in classes("tuner"):
        if issubclass(cls, Delta):
            config_of(cls)
