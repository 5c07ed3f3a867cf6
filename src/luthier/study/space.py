"""What a search goes over: recipe keys, settings of methods within the ranges they declare, methods, layers.

`learning_rate`, `tuner.r` (the declared range), `tuner.r=4..64`, `tuner.r=4..64 log`, `tuner.r=4|8|16`,
`tuner=lora|ssf|dora` (and what each of them declares), `objective=dpo|ipo`, `optim=adamw|lion`, `layers`
(each on or off).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from luthier.errors import RecipeError
from luthier.methods.searchers._base import Dim, Space
from luthier.recipe.aliases import METHOD_KEYS
from luthier.recipe.recipe import Recipe, key_of, terms
from luthier.registry import Choices, Range, build, did_you_mean, spec

KINDS = {**METHOD_KEYS, "objective": "objective"}  # keys that hold one method
TUNERS = ("lora", "dora", "ssf", "bitfit", "houlsby", "full")  # what `tuner` alone goes over
# what must stay
ALIKE = (
    "data",
    "eval_data",
    "max_length",
    "chat_template",
    "evaluate",
    "model",
    "seed",
    "output_dir",
    "plan",
)
AROUND = 10.0  # a learning rate that the recipe names is searched from a tenth of it to ten times it
LAYERS = "layers"


@dataclass(frozen=True)
class SearchSpace:
    """A recipe and the settings that vary on it."""

    recipe: Recipe
    space: Space
    methods: Mapping[str, Mapping[str, Any]]  # key -> label -> what stands in the recipe
    begins: Mapping[str, Any] | None  # the recipe itself as a point; None where it does not lie in the space

    def recipe_of(self, point: Mapping[str, Any]) -> Recipe:
        """A point as a recipe."""
        changes: dict[str, Any] = {}
        kept: list[int] = []
        for dim in self.space.dims:
            if dim.name not in point:
                continue
            value = point[dim.name]
            if dim.name.startswith(f"{LAYERS}."):
                kept += [int(dim.name.partition(".")[2])] if value else []
            elif dim.name in self.methods:
                changes[dim.name] = self.methods[dim.name][value]
            else:
                key, _, setting = dim.name.partition(".")
                home = dim.when[0] if dim.when else key
                changes[f"{home}.{setting}" if setting else key] = value
        made = self.recipe.but(**changes) if changes else self.recipe
        flags = [d for d in self.space.dims if d.name.startswith(f"{LAYERS}.")]
        return only_layers(made, kept, len(flags)) if flags and len(kept) < len(flags) else made


def only_layers(recipe: Recipe, kept: Sequence[int], of: int) -> Recipe:
    """A recipe whose tuner leaves the other layers alone."""
    return recipe.but(**{f"tuner.{k}": v for k, v in build("tuner", recipe.tuner).only(kept, of).items()})


def over(recipe: Recipe, said: Sequence[str] = ()) -> SearchSpace:
    """said: what to go over, as the command line has it; nothing: the learning rate, and what the recipe's
    methods declare.
    """
    asked = [part for text in said for part in _split(text)]
    if not asked:
        asked = [
            "learning_rate",
            *(f"{key}.{name}" for key in KINDS for name in ranges(_method(recipe, key))),
        ]
        asked += getattr(_method(recipe, "tuner"), "over", ())
    dims: dict[str, Dim] = {}
    methods: dict[str, dict[str, Any]] = {}
    inside = True
    for part in sorted(asked, key=lambda p: "." in p.partition("=")[0]):  # methods before their settings
        key, equals, values = (x.strip() for x in part.partition("="))
        key = ".".join([key_of(key.split(".")[0]), *key.split(".")[1:]])
        if key.split(".")[0] in ALIKE:
            raise RecipeError(
                f"--over {key}: what is measured, and on which rows, must stay the same in a search"
            )
        if key == LAYERS:
            dims |= {d.name: d for d in _layers(recipe)}
        elif key in KINDS and "." not in key:
            found, labels, same = _choices(recipe, key, values)
            dims |= {d.name: d for d in found}
            methods[key], inside = labels, inside and same
        elif key.split(".")[0] in methods:
            name, setting = key.split(".", 1)
            some = [
                d for d in dims.values() if d.when and d.when[0] == name and d.name.endswith(f".{setting}")
            ]
            if not some and not equals:
                raise RecipeError(
                    f"--over {key}: none of {', '.join(methods[name])} declares a range for it; give one, as"
                    f" {key}=4..64"
                )
            for d in some if equals else ():
                dims[d.name] = _dim(d.name, values, d.default, d, d.when)
            for label, told in methods[name].items() if equals and not some else ():
                there = spec(_built(name, told))
                if setting in there:
                    dims[f"{label}.{setting}"] = _dim(
                        f"{label}.{setting}", values, there[setting], None, (name, label)
                    )
        else:
            dims[key] = _setting(recipe, key, values if equals else None)
    if not dims:
        raise RecipeError("--over: nothing varies")
    space = Space(tuple(sorted(dims.values(), key=lambda d: d.when is not None)))
    inside = inside and all(d.default is not None for d in space.dims)
    return SearchSpace(recipe, space, methods, space.start() if inside else None)


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth, here = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and not depth:
            parts.append(here)
            here = ""
        else:
            here += c
    return [p.strip() for p in (*parts, here) if p.strip()]


def _built(key: str, told: Any) -> Any:
    return terms(told) if key == "objective" else build(KINDS[key], told)


def _method(recipe: Recipe, key: str) -> Any:
    """What a recipe's key holds, built; None where that is not one method."""
    told = getattr(recipe, key)
    if told in (None, "auto") or (key == "optim" and isinstance(recipe.optim, list)):
        return None
    made = _built(key, told)
    return made if hasattr(made, "kind") else None


def ranges(method: Any) -> dict[str, Range | Choices]:
    """Setting -> the range, or the steps, that a method (or Recipe) declares for it."""
    if method is None:
        return {}
    cls = method if isinstance(method, type) else type(method)
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: found for f in fields(cls) if (found := _range(hints.get(f.name))) is not None}


def _range(hint: Any) -> Range | Choices | None:
    if isinstance(hint, (Range, Choices)):
        return hint
    if hasattr(hint, "__metadata__"):
        return next((m for m in hint.__metadata__ if isinstance(m, (Range, Choices))), None) or _range(
            get_args(hint)[0]
        )
    return (
        next((found for a in get_args(hint) if (found := _range(a)) is not None), None)
        if get_origin(hint)
        else None
    )


def _whole(cls: type, name: str) -> bool:
    hint = get_type_hints(cls)[name]
    return hint is int or int in get_args(hint) and float not in get_args(hint)


def _choices(recipe: Recipe, key: str, values: str) -> tuple[list[Dim], dict[str, Any], bool]:
    """A choice of methods and the settings that each of them declares; is the recipe's own among them?"""
    own = getattr(recipe, key)
    own_name = own.get("name") if isinstance(own, Mapping) else own
    if not values and key != "tuner":
        raise RecipeError(f"--over {key}: say which, as {key}=a|b")
    labels: dict[str, Any] = {}
    for each in values.split("|") if values else [str(own_name), *(t for t in TUNERS if t != own_name)]:
        told = yaml.safe_load(each)
        label = told if isinstance(told, str) else re.sub(r"[{}'\" ]", "", each)
        if label == own_name:
            labels[label] = own
            continue
        labels[label] = getattr(recipe.but(**{key: told}), key)
    found = [Dim(key, choices=tuple(labels), default=own_name if own_name in labels else None)]
    for label, told in labels.items():
        made = _built(key, told)
        if hasattr(made, "kind"):
            for name, r in ranges(made).items():
                found.append(
                    _declared(
                        f"{label}.{name}", r, getattr(made, name), _whole(type(made), name), (key, label)
                    )
                )
    return found, labels, own_name in labels


def _declared(
    name: str, r: Range | Choices, default: Any, whole: bool, when: tuple[str, Any] | None = None
) -> Dim:
    """A declared range, widened to what the recipe says, where a logarithm allows it; of steps one more."""
    if isinstance(r, Choices):
        return Dim(
            name,
            choices=tuple(sorted({*r.values, default})),
            ordered=True,
            whole=whole,
            default=default,
            when=when,
        )
    known = isinstance(default, (int, float)) and not isinstance(default, bool) and (default > 0 or not r.log)
    low, high = (min(r.low, default), max(r.high, default)) if known else (r.low, r.high)
    return Dim(name, low, high, r.log, whole, default=default if known else None, when=when)


def _setting(recipe: Recipe, key: str, values: str | None) -> Dim:
    """One setting: of the recipe, or of a method it names."""
    first, _, setting = key.partition(".")
    if setting:
        owner = _method(recipe, first) if first in KINDS else None
        if owner is None:
            raise RecipeError(
                f"--over {key}: '{first}' holds no single method in this recipe{did_you_mean(first, KINDS)}"
            )
        there = [f.name for f in fields(owner)]
        if setting not in there:
            raise RecipeError(
                f"--over {key}: {owner.kind} '{owner.name}' has no setting '{setting}'{did_you_mean(setting, there)}"
            )
        name, default, declared, whole = (
            setting,
            getattr(owner, setting),
            ranges(owner).get(setting),
            _whole(type(owner), setting),
        )
    else:
        there = [f.name for f in fields(Recipe) if f.name not in ("origins", "told")]
        if key not in there:
            raise RecipeError(f"--over: a recipe has no '{key}'{did_you_mean(key, [*there, LAYERS])}")
        name, default, declared, whole = (
            key,
            getattr(recipe, key),
            ranges(Recipe).get(key),
            _whole(Recipe, key),
        )
        if key == "learning_rate" and default and default != Recipe().learning_rate:
            declared = Range(default / AROUND, default * AROUND, log=True)
    if values is not None:
        known = (
            Dim(key, declared.low, declared.high, declared.log, whole)
            if isinstance(declared, Range)
            else None
        )
        made = _dim(key, values, default, known, None, whole)
        return replace(
            made, ordered=isinstance(declared, Choices) and list(made.choices) == sorted(made.choices)
        )
    if declared is None:
        raise RecipeError(
            f"--over {key}: no range is declared for {name}; give one, as {key}=1..10, or choices, as"
            f" {key}=1|2|4"
        )
    return _declared(key, declared, default, whole)


def _dim(
    name: str, values: str, default: Any, known: Dim | None, when: tuple[str, Any] | None, whole: bool = False
) -> Dim:
    """'4..64', '1e-5..1e-2 log' or 'a|b'."""
    found = re.fullmatch(r"\s*([-+\d.eE]+?)\s*\.\.\s*([-+\d.eE]+)\s*(log)?\s*", values)
    try:
        if found:
            low, high = float(found[1]), float(found[2])
            log = bool(found[3]) or (known.log if known else False)
            whole = (
                known.whole if known else whole or isinstance(default, int) and not isinstance(default, bool)
            )
            inside = isinstance(default, (int, float)) and low <= default <= high
            return Dim(name, low, high, log, whole, default=default if inside else None, when=when)
        choices = tuple(yaml.safe_load(v) for v in values.split("|"))
        return Dim(name, choices=choices, default=default if default in choices else None, when=when)
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(
            f"--over {name}={values}: not a range such as 4..64 or choices such as 4|8|16 ({error})"
        ) from None


def _layers(recipe: Recipe) -> list[Dim]:
    """Each layer, tuned or not."""
    from luthier.recipe import model_names

    if not hasattr(build("tuner", recipe.tuner), "only"):
        raise RecipeError(
            f"--over layers: tuner '{build('tuner', recipe.tuner).name}' does not choose among layers"
        )
    count = getattr(model_names.model_config(recipe.model).get_text_config(), "num_hidden_layers", None)
    if not count:
        raise RecipeError(f"--over layers: the config of {recipe.model} does not say how many layers it has")
    return [Dim(f"{LAYERS}.{i}", choices=(True, False), default=True) for i in range(count)]
