"""From plain data to a method with checked settings, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from luthier.errors import RecipeError, quoted, shortened
from luthier.registry.discover import did_you_mean, find

LISTED = 5  # errors of one method's settings that a sentence tells


def build(kind: str, spec: Any) -> Any:
    """'lora' or {name: lora, r: 16} -> the method with its settings, checked.

    Raises RecipeError for an unknown name or setting, a value of the wrong type, or one out of range.
    """
    if getattr(spec, "kind", None) == kind:
        return spec
    if spec is False:
        spec = "off"  # as YAML reads it where it is not in quotes
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, dict) or "name" not in spec:
        raise RecipeError(f"{kind}: expected a name or {{name: ..., setting: ...}}, not {quoted(spec)}")
    if not isinstance(spec["name"], str):
        raise RecipeError(f"{kind}: a name is text, not {quoted(spec['name'])}")
    cls = find(kind, spec["name"])
    if spec["name"] in cls.former:
        warn_of_former(kind, spec["name"], cls.name)
    settings = {}
    for key, value in spec.items():
        if key in cls.former_settings:
            warn_of_former(f"{kind} '{cls.name}': setting", key, cls.former_settings[key])
            settings[cls.former_settings[key]] = value
        elif key != "name":
            settings[key] = value
    allowed = [f.name for f in fields(cls)]
    for key in settings:
        if key not in allowed:
            hint = did_you_mean(str(key), allowed)
            raise RecipeError(f"{kind} '{cls.name}' has no setting '{shortened(key)}'{hint}")
    try:
        return _validator(cls).validate_python(settings)
    except ValidationError as error:
        raise RecipeError(f"{kind} '{cls.name}': {format_errors(error)}") from None
    except (TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        # a setting of any type, which the method itself looks at
        raise RecipeError(
            f"{kind} '{cls.name}': these settings cannot be used: {quoted(settings)}"
            f" ({type(error).__name__}: {shortened(str(error))})"
        ) from None


@cache
def warn_of_former(label: str, old: str, new: str) -> None:
    """Say once that a name has changed."""
    warnings.warn(f"{label} '{old}' is now called '{new}'", FutureWarning, stacklevel=3)


@cache
def _validator(cls: type) -> TypeAdapter:
    """What checks a class's settings, made once: making it takes longer than using it."""
    return TypeAdapter(cls)


def format_errors(error: ValidationError) -> str:
    """Pydantic's errors as one line: which setting, what is wrong, what its value was."""
    internal = ("function-", "is-instance", "union", "constrained")
    lines = []
    for e in error.errors():
        place = ".".join(str(p) for p in e["loc"] if not str(p).startswith(internal))
        inner = (e.get("ctx") or {}).get("error")
        if isinstance(inner, ValueError):
            lines.append(f"{place}: {inner}".removeprefix(": "))
        else:
            message = e["msg"][:1].lower() + e["msg"][1:]
            lines.append(f"{place}: {message}, not {quoted(e['input'])}")
    lines = [*dict.fromkeys(lines)]
    if len(lines) > LISTED:
        lines[LISTED:] = [f"and {len(lines) - LISTED} more"]
    return "; ".join(shortened(line, 400) for line in lines)


def nested(kind: str) -> BeforeValidator:
    """For a field that holds another method: `reward: Annotated[Any, nested("reward")] = "exact_match"`."""
    return BeforeValidator(partial(build, kind))


def nested_list(kind: str) -> BeforeValidator:
    """For a field that holds several: `inner: Annotated[tuple, nested_list("transform")] = ("adam",)`."""

    def validate(value: Any) -> tuple[Any, ...]:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(build(kind, item) for item in items)

    return BeforeValidator(validate)


def spec(method: Any) -> Any:
    """The way back: a method as plain data, every setting written out."""
    if isinstance(method, dict):
        return {k: spec(v) for k, v in method.items()}
    if isinstance(method, (list, tuple)):
        return [spec(m) for m in method]
    if is_dataclass(method) and hasattr(method, "kind"):
        return {"name": method.name, **{f.name: spec(getattr(method, f.name)) for f in fields(method)}}
    return method


def submethods(method: Any) -> Iterator[Any]:
    """The methods that a method's fields hold."""
    for f in fields(method):
        value = getattr(method, f.name)
        for item in value if isinstance(value, tuple) else (value,):
            if hasattr(item, "kind"):
                yield item


def requires_of(method: Any) -> frozenset[str]:
    """What a method requires under its settings, and what the methods in it require.

    A method whose settings change that says so by `active_requires`.
    """
    own = frozenset(getattr(method, "active_requires", method.requires))
    return own.union(*(requires_of(m) for m in submethods(method)))


def provides_of(method: Any) -> frozenset[str]:
    """What a method provides under its settings (`active_provides` where they change it)."""
    return frozenset(getattr(method, "active_provides", method.provides))
