"""What a search varies: recipe keys, settings of methods within the ranges they declare, methods, layers.

`learning_rate`, `tuner.r` (the declared range), `tuner.r=4..64`, `tuner.r=4..64 log`, `tuner.r=4|8|16`,
`tuner=lora|ssf|dora` (and what each of them declares), `objective=dpo|ipo`, `optim=adamw|lion`, `layers`
(each on or off).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

from luthier.errors import RecipeError
from luthier.methods.searchers._base import Dim, Space
from luthier.recipe.aliases import METHOD_KEYS
from luthier.recipe.model_names import model_config
from luthier.recipe.read import name_of
from luthier.recipe.recipe import Recipe, key_of, terms
from luthier.registry import Choices, Range, build, did_you_mean, spec
from luthier.storage.bounded_yaml import load_yaml

KINDS = {**METHOD_KEYS, "objective": "objective"}  # recipe keys that hold one method, and its kind
TUNERS = ("lora", "dora", "ssf", "bitfit", "houlsby", "full")  # what `tuner` alone varies
# recipe keys that must not vary, or trials would not be measured alike
FIXED = (
    "data",
    "eval_data",
    "max_length",
    "chat_template",
    "chat_template_kwargs",
    "split_special_tokens",
    "evaluate",
    "model",
    "seed",
    "output_dir",
    "plan",
)
AROUND = 10.0  # a learning rate that the recipe names is searched from a tenth of it to ten times it
LAYERS = "layers"
RANGE = re.compile(r"\s*([-+\d.eE]+?)\s*\.\.\s*([-+\d.eE]+)\s*(log)?\s*")
INTERNAL = ("origins", "told", "warnings")  # fields of a recipe that are no keys

When = tuple[str, Any]  # (setting, value) under which another setting counts


@dataclass(frozen=True)
class SearchSpace:
    """A recipe and the settings that vary on it."""

    recipe: Recipe
    space: Space
    methods: Mapping[str, Mapping[str, Any]]  # key -> label of a choice -> what stands in the recipe
    start: Mapping[str, Any] | None  # the recipe itself as a point; None where it lies outside of the space

    def recipe_of(self, point: Mapping[str, Any]) -> Recipe:
        """A point as a recipe."""
        changes: dict[str, Any] = {}
        tuned_layers: list[int] = []
        for dim in self.space.dims:
            if dim.name not in point:
                continue
            value = point[dim.name]
            key, _, setting = dim.name.partition(".")
            if key == LAYERS:
                if value:
                    tuned_layers.append(int(setting))
            elif dim.name in self.methods:
                changes[dim.name] = self.methods[dim.name][value]
            elif setting:
                if dim.when:
                    key = dim.when[0]
                changes[f"{key}.{setting}"] = value
            else:
                changes[key] = value
        recipe = self.recipe
        if changes:
            recipe = recipe.but(**changes)
        layers = sum(dim.name.startswith(f"{LAYERS}.") for dim in self.space.dims)
        if len(tuned_layers) < layers:
            return only_layers(recipe, tuned_layers, layers)
        return recipe


def only_layers(recipe: Recipe, layers: Sequence[int], of: int) -> Recipe:
    """A recipe whose tuner changes these layers alone."""
    settings = build("tuner", recipe.tuner).only(layers, of)
    return recipe.but(**{f"tuner.{key}": value for key, value in settings.items()})


def parse_space(recipe: Recipe, texts: Sequence[str] = ()) -> SearchSpace:
    """texts: what varies, as on the command line; none: the learning rate, and what the recipe's methods
    declare. Raises RecipeError for what cannot vary.
    """
    parts: list[str] = []
    for text in texts:
        parts += _split(text)
    parser = _Parser(recipe, any(part.partition("=")[0].strip() == "tuner" for part in parts))
    # methods before their settings
    for part in sorted(parts or _usual(recipe), key=lambda p: "." in p.partition("=")[0]):
        parser.add(part)
    if not parser.dims:
        raise RecipeError("--space: nothing varies; name at least one key, such as tuner.r=4..64")
    return parser.result()


def _usual(recipe: Recipe) -> list[str]:
    """The learning rate, and what the recipe's methods declare."""
    parts = ["learning_rate"]
    for key in KINDS:
        parts += [f"{key}.{name}" for name in ranges(_method(recipe, key))]
    return [*parts, *getattr(_method(recipe, "tuner"), "over", ())]


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


class _Parser:
    """The dimensions of a space, part by part."""

    def __init__(self, recipe: Recipe, varies_tuner: bool = False):
        self.recipe = recipe
        self.varies_tuner = varies_tuner
        self.dims: dict[str, Dim] = {}
        self.methods: dict[str, dict[str, Any]] = {}
        self.contains_recipe = True  # are the recipe's own methods among the choices?

    def add(self, part: str) -> None:
        """part: such as `tuner=lora|ssf` or `learning_rate`."""
        name, equals, written = (x.strip() for x in part.partition("="))
        values = None
        if equals:
            values = written
        first, *rest = name.split(".")
        first = key_of(first)
        key = ".".join([first, *rest])
        if first in FIXED:
            raise RecipeError(
                f"--space {key}: what is measured, and on which rows, must stay fixed during a search"
            )
        if key == LAYERS:
            self._extend(_layers(self.recipe))
        elif key in KINDS:
            self._add_choices(key, written)
        elif first in self.methods:
            self._narrow(first, ".".join(rest), values)
        else:
            self.dims[key] = _setting(self.recipe, key, values, self.varies_tuner)

    def result(self) -> SearchSpace:
        space = Space(tuple(sorted(self.dims.values(), key=lambda d: d.when is not None)))
        start = None
        if self.contains_recipe and all(d.default is not None for d in space.dims):
            start = space.start()
        return SearchSpace(self.recipe, space, self.methods, start)

    def _extend(self, dims: Sequence[Dim]) -> None:
        for dim in dims:
            self.dims[dim.name] = dim

    def _add_choices(self, key: str, values: str) -> None:
        """A choice of methods, and the settings that each of them declares."""
        value = getattr(self.recipe, key)
        own = name_of(value)
        if not values and key != "tuner":
            raise RecipeError(f"--space {key}: list the choices, as {key}=a|b")
        names = [str(own), *(t for t in TUNERS if t != own)]
        if values:
            names = values.split("|")
        methods = {}
        for name in names:
            choice = load_yaml(name, f"--space {key}")
            label = choice
            if not isinstance(choice, str):
                label = re.sub(r"[{}'\" ]", "", name)
            methods[label] = value
            if label != own:
                methods[label] = getattr(self.recipe.but(**{key: choice}), key)
        self.methods[key] = methods
        default = own
        if own not in methods:
            default, self.contains_recipe = None, False
        self._extend([Dim(key, choices=tuple(methods), default=default)])
        for label, choice in methods.items():
            method = _build(key, choice)
            if hasattr(method, "kind"):
                self._extend(_declared_settings(method, key, label))

    def _narrow(self, key: str, setting: str, values: str | None) -> None:
        """`tuner.r=4..64` where the tuner is a choice: the setting of every method that has it."""
        declared = []
        for dim in self.dims.values():
            if dim.when and dim.when[0] == key and dim.name.endswith(f".{setting}"):
                declared.append(dim)
        if values is None:
            if not declared:
                raise RecipeError(
                    f"--space {key}.{setting}: {', '.join(self.methods[key])} declare no range"
                    f" for it; write one, as {key}.{setting}=4..64"
                )
            return
        for dim in declared:
            self.dims[dim.name] = _dim(dim.name, values, dim.default, dim, dim.when)
        if declared:
            return
        for label, choice in self.methods[key].items():
            settings = spec(_build(key, choice))
            if setting in settings:
                name = f"{label}.{setting}"
                self.dims[name] = _dim(name, values, settings[setting], None, (key, label))


def _build(key: str, value: Any) -> Any:
    if key == "objective":
        return terms(value)
    return build(KINDS[key], value)


def _method(recipe: Recipe, key: str) -> Any:
    """What a recipe's key holds, built; None where that is not one method."""
    value = getattr(recipe, key)
    if value in (None, "auto") or (key == "optim" and isinstance(recipe.optim, list)):
        return None
    method = _build(key, value)
    if not hasattr(method, "kind"):
        return None
    return method


# ------------------------------------------------------------------------------- declared ranges


def ranges(method: Any) -> dict[str, Range | Choices]:
    """Setting -> the range, or the choices, that a method (or Recipe) declares for it."""
    if method is None:
        return {}
    cls = method
    if not isinstance(method, type):
        cls = type(method)
    hints = get_type_hints(cls, include_extras=True)
    declared = {}
    for field in fields(cls):
        inner_range = _range(hints.get(field.name))
        if inner_range is not None:
            declared[field.name] = inner_range
    return declared


def _range(hint: Any) -> Range | Choices | None:
    """The range inside of an annotation."""
    if isinstance(hint, (Range, Choices)):
        return hint
    inner = get_args(hint) if get_origin(hint) else ()
    if hasattr(hint, "__metadata__"):
        inner = (*hint.__metadata__, get_args(hint)[0])
    for part in inner:
        inner_range = _range(part)
        if inner_range is not None:
            return inner_range
    return None


def _is_whole(cls: type, name: str) -> bool:
    """Does a setting hold whole numbers?"""
    hint = get_type_hints(cls)[name]
    return hint is int or (int in get_args(hint) and float not in get_args(hint))


def _declared_settings(method: Any, key: str, label: str) -> list[Dim]:
    """A dimension for each setting of a method that declares a range, under this choice of `key`."""
    dims = []
    for name, declared in ranges(method).items():
        whole = _is_whole(type(method), name)
        dims.append(_declared(f"{label}.{name}", declared, getattr(method, name), whole, (key, label)))
    return dims


def _declared(
    name: str, declared: Range | Choices, default: Any, whole: bool, when: When | None = None
) -> Dim:
    """A declared range, widened to the recipe's own value where a logarithm allows it; choices with the
    recipe's own among them.
    """
    if isinstance(declared, Choices):
        choices = tuple(sorted({*declared.values, default}))
        return Dim(name, choices=choices, ordered=True, whole=whole, default=default, when=when)
    low, high, log = declared.low, declared.high, declared.log
    number = isinstance(default, (int, float)) and not isinstance(default, bool)
    if not number or (log and default <= 0):
        return Dim(name, low, high, log, whole, when=when)
    return Dim(name, min(low, default), max(high, default), log, whole, default=default, when=when)


# --------------------------------------------------------------------------------- single settings


def _setting(recipe: Recipe, key: str, values: str | None, varies_tuner: bool = False) -> Dim:
    """One setting of the recipe, or of a method it names. values: as given; None: as declared.

    varies_tuner: several tuners are tried. Then a learning rate that is the default of one of them says
    little of the others, and the whole declared range is searched.
    """
    first, _, setting = key.partition(".")
    if setting:
        owner = _owner(recipe, key)
        name, default, cls = setting, getattr(owner, setting), type(owner)
    else:
        keys = [f.name for f in fields(Recipe) if f.name not in INTERNAL]
        if key not in keys:
            raise RecipeError(f"--space: a recipe has no key '{key}'{did_you_mean(key, [*keys, LAYERS])}")
        name, default, cls = key, getattr(recipe, key), Recipe
    declared, whole = ranges(cls).get(name), _is_whole(cls, name)
    of_one_tuner = varies_tuner and recipe.origins.get(key) == "default"
    if key == "learning_rate" and default and not of_one_tuner:
        declared = Range(default / AROUND, default * AROUND, log=True)
    if values is None:
        if declared is None:
            raise RecipeError(
                f"--space {key}: {name} declares no range; write one, as {key}=1..10, or"
                f" choices, as {key}=1|2|4"
            )
        return _declared(key, declared, default, whole)
    template = None
    if isinstance(declared, Range):
        template = Dim(key, declared.low, declared.high, declared.log, whole)
    dim = _dim(key, values, default, template, None, whole)
    ordered = isinstance(declared, Choices) and list(dim.choices) == sorted(dim.choices)
    return replace(dim, ordered=ordered)


def _owner(recipe: Recipe, key: str) -> Any:
    """The method of the recipe that has this setting."""
    first, _, setting = key.partition(".")
    owner = None
    if first in KINDS:
        owner = _method(recipe, first)
    if owner is None:
        raise RecipeError(
            f"--space {key}: '{first}' is not a single method in this recipe{did_you_mean(first, KINDS)}"
        )
    settings = [f.name for f in fields(owner)]
    if setting not in settings:
        raise RecipeError(
            f"--space {key}: {owner.kind} '{owner.name}' has no setting"
            f" '{setting}'{did_you_mean(setting, settings)}"
        )
    return owner


def _dim(
    name: str, values: str, default: Any, template: Dim | None, when: When | None, whole: bool = False
) -> Dim:
    """'4..64', '1e-5..1e-2 log' or 'a|b'. template: the declared range, which says what the text does not."""
    match = RANGE.fullmatch(values)
    try:
        if match is None:
            choices = tuple(load_yaml(value, f"--space {name}") for value in values.split("|"))
            if default not in choices:
                default = None
            return Dim(name, choices=choices, default=default, when=when)
        low, high, log = float(match[1]), float(match[2]), bool(match[3])
        if template is not None:
            whole, log = template.whole, log or template.log
        else:
            whole = whole or (isinstance(default, int) and not isinstance(default, bool))
        if not isinstance(default, (int, float)) or not low <= default <= high:
            default = None
        return Dim(name, low, high, log, whole, default=default, when=when)
    except ValueError as error:
        raise RecipeError(
            f"--space {name}={values}: expected a range such as 4..64 or choices such as 4|8|16 ({error})"
        ) from None


def _layers(recipe: Recipe) -> list[Dim]:
    """Each layer, tuned or not."""
    tuner = build("tuner", recipe.tuner)
    if not hasattr(tuner, "only"):
        raise RecipeError(f"--space layers: tuner '{tuner.name}' does not support a choice of layers")
    count = getattr(model_config(recipe.model).get_text_config(), "num_hidden_layers", None)
    if not count:
        raise RecipeError(f"--space layers: the config of {recipe.model} does not give the number of layers")
    return [Dim(f"{LAYERS}.{i}", choices=(True, False), default=True) for i in range(count)]
