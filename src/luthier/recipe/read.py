"""From YAML, a mapping and changes to a Recipe: keys of other tools and of luthier 0.1 are understood,
settings of methods may stand at the top, and every value remembers where it came from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from luthier.errors import Damaged, RecipeError, quoted, shortened
from luthier.recipe.aliases import (
    ALIASES,
    DTYPES,
    FORMER_KEYS,
    FORMER_ROLES,
    METHOD_KEYS,
    NAMES,
    QUANTIZATION,
)
from luthier.recipe.in_memory import own_splits, rows_in_memory
from luthier.recipe.published import is_published, resolve
from luthier.registry import did_you_mean, find, former_names, names
from luthier.registry.discover import module_of, source_of
from luthier.storage import audio, files, images
from luthier.storage.bounded_yaml import MAX_CHARACTERS, load_yaml
from luthier.storage.toy import is_toy, toy_name, toy_package

MAX_DOTS = 20  # in the key of a change


def read(source: Any, changes: Any, defaults: Mapping[str, Any]) -> Reading:
    """Keys and values of a recipe as `Recipe.load` takes them. defaults: every key of a recipe -> its
    default.
    """
    left = list(read_changes(changes))
    if is_published(source):
        name = source
        values, left = resolve(source, left)
    else:
        values, name = read_source(source)
    origins = dict.fromkeys(values, name)
    # short keys first: tuner=lora must not undo tuner.r=16
    for key, value in sorted(left, key=lambda change: change[0].count(".")):
        put(values, key, value, defaults)
        origins[key.split(".")[0]] = "command line"
    reading = Reading(paths_as_text(values), origins, defaults)
    reading.read_quantization()
    for key, value in reading.values.items():
        reading.read_key(str(key), value)
    reading.settle()
    splits = own_splits(reading.out.get("data"))
    if splits and reading.out.get("eval_data", "auto") == "auto":
        reading.out["data"], reading.out["eval_data"] = splits
    return reading


# ------------------------------------------------------------------------------------------------ source


def read_source(source: Any) -> tuple[dict[str, Any], str]:
    """Keys and values as they were written, and what to call their place: a file's name, "yaml", "python"."""
    if source is None:
        return {}, "python"
    if isinstance(source, Mapping):
        return dict(source), "python"
    text, name = str(source), "yaml"
    if is_toy(source):
        return toy_recipe(text), text
    if isinstance(source, Path) or ("\n" not in text and text.endswith((".yaml", ".yml", ".json"))):
        text, name = read_file(Path(source))
    values = load_yaml(text, name)
    if not isinstance(values or {}, dict):
        shape = type(values).__name__
        raise RecipeError(f"{name}: a recipe must be a mapping of `key: value`, not {shape} {quoted(values)}")
    return dict(values or {}), name


def toy_recipe(name: str) -> dict[str, Any]:
    """The recipe of a toy task, by its name."""
    try:
        return toy_package().recipe(toy_name(name))
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from None


def read_file(path: Path) -> tuple[str, str]:
    """Text and name of a recipe's file."""
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.y*ml")]
        place = shortened(str(path), 200)
        raise RecipeError(f"recipe file {place} does not exist{did_you_mean(path.name, near)}")
    try:
        return files.read_text(path, 4 * MAX_CHARACTERS), path.name
    except Damaged as error:
        raise RecipeError(f"recipe file {path} cannot be read: {error}") from None


def read_changes(changes: Any) -> Iterable[tuple[str, Any]]:
    """Changes as (key, value), from a mapping or from texts such as "tuner.r=16"."""
    if isinstance(changes, Mapping):
        yield from changes.items()
        return
    for change in changes or ():
        key, equals, value = change.partition("=")
        if not equals or not key.strip():
            raise RecipeError(
                f"'{shortened(change)}' is not of the form key=value, such as learning_rate=1e-4 or"
                " tuner.r=16"
            )
        if key.count(".") > MAX_DOTS:
            raise RecipeError(f"'{shortened(key)}' has more than {MAX_DOTS} dots")
        yield key.strip(), load_yaml(value, f"'{shortened(change)}'")


def put(values: dict, key: str, value: Any, defaults: Mapping[str, Any]) -> None:
    """Set a.b=c; a method named by a string becomes {name: ...} so that its settings have a place."""
    first, *rest = key.split(".")
    if not rest:
        values[first] = value
        return
    old = values.get(first)
    if old is None and (first in METHOD_KEYS or first == "objective"):
        old = defaults.get(first)
    if old is None:
        old = {}
    if isinstance(old, str) and (first in METHOD_KEYS or first in ("objective", "plan")):
        old = {"name": old}
    if not isinstance(old, dict):
        raise RecipeError(f"'{key}' cannot be set: {first} is {quoted(old)}, which has no settings")
    inner = dict(old)
    put(inner, ".".join(rest), value, {})
    values[first] = inner


def paths_as_text(value: Any) -> Any:
    """Paths as text, and tables of rows as lists, at any depth: from Python they come as `Path`, Dataset or
    DataFrame. Images in memory are written, and become paths; so do recordings.
    """
    if isinstance(value, (str, int, float)) or value is None:
        return value
    if images.is_in_memory(value):
        return images.in_file(value)
    if audio.is_in_memory(value):
        try:
            return audio.in_file(value)
        except ValueError as error:
            raise RecipeError(f"a recording of the data cannot be read: {error}") from None
    if not hasattr(value, "kind"):  # methods are data already
        rows = rows_in_memory(value)
        if rows is not None:
            return rows
    if isinstance(value, Mapping):
        return {k: paths_as_text(v) for k, v in value.items()}
    if isinstance(value, list):
        return [paths_as_text(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


# ------------------------------------------------------------------------------------------------ keys


@dataclass
class Reading:
    """Values on their way to a recipe: `out` by keys of a recipe, and what the user is to know of it."""

    values: dict[str, Any]  # as written
    sources: dict[str, str]  # key as written -> its place
    defaults: Mapping[str, Any]  # of every key of a recipe
    out: dict[str, Any] = field(default_factory=dict)  # key of a recipe -> value
    loose: dict[str, Any] = field(default_factory=dict)  # settings of methods at the top
    origins: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def read_key(self, key: str, value: Any) -> None:
        """One key as written: a recipe's, an alias, or a setting of a method."""
        if key == "transforms" and value is None:
            return  # 0.1 wrote it out where `optim` was meant
        name = key if key in self.defaults else FORMER_KEYS.get(key, ALIASES.get(key, key))
        if name == "":
            why = "a recipe always trains"
            if key != "do_train":
                why = "a run resumes automatically from its last checkpoint"
            self.warnings.append(f"'{key}' is ignored: {why}")
            return
        if key in ("bf16", "fp16"):
            others = {"dtype", "torch_dtype", "bf16", "fp16"} & (self.values.keys() - {key})
            if not value and others:
                return  # `bf16: true, fp16: false` says one thing
            name = "dtype"
            value = {"bf16": "bfloat16", "fp16": "float16"}[key] if value else "auto"
        value = in_our_names(name, value)
        if name == "dtype" and isinstance(value, str):
            word = value.removeprefix("torch.")
            value = DTYPES.get(word, word)
        if name == "roles" and isinstance(value, Mapping):
            value = self.read_roles(value)
        if name == "learning_rate" and isinstance(value, Mapping):
            rates = dict(value)
            default = rates.pop("default", None)
            self.out["learning_rates"] = rates
            self.origins["learning_rates"] = self.sources.get(key, "python")
            if default is None:
                return
            value = default
        if key in FORMER_KEYS and name != key:
            self.warnings.append(f"'{key}' is now called '{name}'")
        elif name != key:
            self.warnings.append(f"'{key}' is read as '{name}'")
        self.origins[name] = self.sources.get(key, "python")
        if name not in self.defaults:
            self.loose[name] = value
        elif name not in self.out or (key == "transforms" and name == "optim"):
            self.out[name] = value
        elif not (name == "optim" and isinstance(self.out[name], list)):
            raise RecipeError(f"'{key}' and '{name}' are the same key; keep one of them")

    def read_roles(self, roles: Mapping[str, Any]) -> dict[str, Any]:
        """Roles under the names that they have now."""
        out = {}
        for name, role in roles.items():
            new = FORMER_ROLES.get(name, name)
            if new != name:
                self.warnings.append(f"role '{name}' is now called '{new}'")
            out[new] = role
        return out

    def read_quantization(self) -> None:
        """transformers' words for a quantized base (load_in_4bit, ...), and qlora, which others call an
        adapter.
        """
        values = self.values
        qlora = [k for k, v in values.items() if ALIASES.get(str(k), k) == "tuner" and name_of(v) == "qlora"]
        for key in qlora:
            values[key] = {**values[key], "name": "lora"} if isinstance(values[key], Mapping) else "lora"
            self.warnings.append(f"'{key}: qlora' is read as `tuner: lora` with a quantized base")
        if "bnb_4bit_compute_dtype" in values:
            values["dtype"] = values.pop("bnb_4bit_compute_dtype")
            self.sources["dtype"] = self.sources.get("bnb_4bit_compute_dtype", "python")
            self.warnings.append("'bnb_4bit_compute_dtype' is read as 'dtype'")
        theirs = {}
        for key in [*values]:
            if key in ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", *QUANTIZATION):
                theirs[key] = values.pop(key)
        words = [*theirs]
        four, eight = theirs.get("load_in_4bit"), theirs.get("load_in_8bit")
        if four and eight:
            raise RecipeError("'load_in_4bit' and 'load_in_8bit' cannot both be true; keep one of them")
        if not (four or eight or qlora):
            if theirs.keys() - {"load_in_4bit", "load_in_8bit"}:
                left = ", ".join(words)
                self.warnings.append(
                    f"ignored: {left}; the base is not quantized (set load_in_4bit: true to quantize it)"
                )
            return
        if values.get("quantization") is not None:
            if four or eight:
                raise RecipeError(f"'{words[0]}' and 'quantization' set the same thing; keep one of them")
            return
        settings = {"name": "int8" if eight else theirs.get("bnb_4bit_quant_type", "nf4")}
        settings |= {ours: theirs[key] for key, ours in QUANTIZATION.items() if key in theirs}
        if eight:
            settings.pop("double_quant", None)
        source = [*words, *qlora]
        values["quantization"] = settings
        self.sources["quantization"] = self.sources.get(str(source[0]), "python")
        self.warnings.append(f"{', '.join(repr(str(k)) for k in source)}: read as quantization {settings}")

    # -------------------------------------------------------------------------------------------- settings

    def settle(self) -> None:
        """Settings of a method that stand at the top of the recipe (`r: 16`, `beta: 0.2`) go to the method
        that has them.
        """
        if not self.loose:
            return
        places = self.places()
        for key, value in self.loose.items():
            homes = [place for place, settings in places.items() if key in settings]
            if not homes:
                raise RecipeError(f"a recipe has no key '{key}'{self.hint(key, places)}")
            if len(homes) > 1:
                choices = " or ".join(f"{home}.{key}" for home in homes)
                raise RecipeError(f"'{key}' is ambiguous: write {choices}")
            self.set_in(homes[0], key, value)
            self.origins[homes[0].split(".")[0]] = self.origins[key]
            self.warnings.append(f"'{key}' is read as '{homes[0]}.{key}'")

    def places(self) -> dict[str, set[str]]:
        """Where a setting may belong: key, or key.number in a list of stages -> the settings of its
        method.
        """
        places: dict[str, set[str]] = {}
        for key, kind in METHOD_KEYS.items():
            name = name_of(self.out.get(key, self.defaults[key]))
            if key == "architecture" and name in ("auto", None):
                name = "causal"
            if isinstance(name, str):
                places[key] = settings_of(kind, name)
        objective = self.out.get("objective", self.defaults["objective"])
        if isinstance(objective, dict) or objective in names("objective"):
            places["objective"] = settings_of("objective", name_of(objective))
        for key in ("online_stages", "stages"):
            stages = self.out.get(key)
            for i, value in enumerate(stages if isinstance(stages, (list, tuple)) else ()):
                if name_of(value) in names("stage"):
                    places[f"{key}.{i}"] = settings_of("stage", name_of(value))
        return places

    def hint(self, key: str, places: Mapping[str, set[str]]) -> str:
        """What a key that nothing here has may have meant."""
        if owners := owners_of(key):
            return f"; it is a setting of {', '.join(owners)}"
        if is_training_argument(key):
            return "; it is one of transformers' TrainingArguments: see `luthier import FILE`"
        return did_you_mean(key, {*self.defaults, *ALIASES}.union(*places.values()))

    def set_in(self, place: str, key: str, value: Any) -> None:
        """Set a method's setting, at a key or at a place of a list of stages."""
        first, _, number = place.partition(".")
        if number:
            stages = list(self.out[first])
            stages[int(number)] = {**as_spec(stages[int(number)]), key: value}
            self.out[first] = stages
            return
        method = self.out.get(first, self.defaults[first])
        if method == "auto":
            method = "causal"
        self.out[first] = {**as_spec(method), key: value}


def owners_of(key: str) -> list[str]:
    """Three of the methods that have a setting of this name. Only those are imported whose file names it:
    importing all of them takes seconds.
    """
    owners = []
    for kind in ("tuner", "objective", "optimizer", "estimator"):
        for name in names(kind):
            source = source_of(module_of(kind, name))
            if declares_setting(source, key) and key in settings_of(kind, name):
                owners.append(f"{kind} '{name}'")
            if len(owners) == 3:
                return owners
    return owners


def declares_setting(source: Path, key: str) -> bool:
    """Whether a class in a file, or in the base files beside it, has a field of this name."""
    field_of = re.compile(rf"^    {re.escape(key)}: ", re.MULTILINE)
    bases = source.parent.glob("_*.py")
    return any(field_of.search(file.read_text("utf-8")) for file in (source, *bases))


def is_training_argument(key: str) -> bool:
    """Whether transformers' trainer has a setting of that name. Its source is read, for the class takes
    seconds to import.
    """
    package = find_spec("transformers")
    source = Path(package.origin or "").with_name("training_args.py") if package else None
    if source is None or not source.is_file():
        return False
    return re.search(rf"^    {re.escape(key)}: ", source.read_text("utf-8"), re.MULTILINE) is not None


def in_our_names(key: str, value: Any) -> Any:
    """A method under the name that it has here: `dora`, alone or with settings, is `lora` with use_dora. Of a
    method with a `config`, as PEFT's types have it, settings that are not its own go there.
    """
    if not isinstance(name_of(value), str) or name_of(value) not in NAMES.get(key, {}):
        return value
    meaning = NAMES[key][name_of(value)]
    if isinstance(value, str):
        return meaning
    spec = as_spec(meaning)
    own = settings_of(METHOD_KEYS.get(key, key), spec["name"])
    for setting, inner in value.items():
        if setting == "name":
            continue
        if setting in own or "config" not in own:
            spec[setting] = inner
        else:
            spec["config"] = {**spec.get("config", {}), setting: inner}
    return spec


def as_spec(value: Any) -> dict[str, Any]:
    """A method as {name: ..., setting: ...}."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise RecipeError(f"expected a name or {{name: ..., setting: ...}}, not {quoted(value)}")
    return dict(value)


def name_of(value: Any) -> Any:
    """The name of a method, written as text or as {name: ...}."""
    if isinstance(value, Mapping):
        return value.get("name")
    return value


def settings_of(kind: str, name: Any) -> set[str]:
    """The settings that a method has."""
    if name not in (*names(kind), *former_names(kind)):
        return set()  # the method is refused when it is built
    return {f.name for f in fields(find(kind, name))}
