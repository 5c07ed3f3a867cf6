"""Which methods there are: files of the wing methods/, and what other packages announce as entry points.

A method's file name, or its entry point's name, is its name in YAML. `card` reads a declaration from the
source, without importing it, so that listings stay fast; `find` imports the one file that a name points at.
A method of another package that cannot be used is named in one warning, and everything else works.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from luthier.errors import PluginWarning, RecipeError, shortened
from luthier.registry.declare import Coverage, coverage_of, declare
from luthier.registry.kinds import KINDS
from luthier.registry.words import Artifact, Capability, Column, Metric

PACKAGE = Path(__file__).parents[1]
DECLARED = {"Capability": Capability, "Column": Column, "Metric": Metric, "Artifact": Artifact}
KEYWORDS = frozenset(inspect.signature(declare("tuner")).parameters)  # of every declaration


@dataclass(frozen=True)
class Card:
    """What a declaration says, read without importing it."""

    kind: str
    name: str
    module: str
    summary: str  # first paragraph of the file
    paper: str | None = None  # "arXiv:2106.09685", or None where no paper introduced it
    rows: tuple[str, ...] = ()  # short names in the catalogue of papers
    use_when: str = ""  # what follows "Use it when"
    former: tuple[str, ...] = ()  # names that it once had
    default_rate: float | None = None  # of a tuner: the learning rate of a recipe that names none
    rate_factor: float = 1.0  # what an objective, optimizer or transform multiplies that rate by
    requires: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    removes: frozenset[str] = frozenset()
    metrics: tuple[Metric, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    coverage: dict[str, Coverage] = field(default_factory=dict, hash=False)  # row -> what is there of it


# ------------------------------------------------------------------------------------ where they are


@cache
def modules(kind: str) -> dict[str, str]:
    """Name -> dotted module of every method of a kind: our folder, then what other packages announce."""
    if kind not in KINDS:
        raise RecipeError(f"there is no kind of method '{kind}'{did_you_mean(kind, KINDS)}")
    places = dict(own_modules(kind))
    for name, point in plugins(kind).items():
        places[name] = point.value.partition(":")[0]
    return places


@cache
def own_modules(kind: str) -> dict[str, str]:
    """Name -> dotted module of the methods in our own folder; a folder with __init__.py is one method."""
    root = PACKAGE / "methods" / KINDS[kind].folder
    places: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root).with_suffix("").parts
        if inner[-1] == "__init__":
            inner = inner[:-1]
        elif (path.parent / "__init__.py").is_file():
            continue
        if any(part.startswith("_") for part in inner):
            continue
        name, dotted = inner[-1], ".".join(("luthier", "methods", KINDS[kind].folder, *inner))
        if name in places:
            raise RuntimeError(f"two {kind}s have the name '{name}': {places[name]} and {dotted}")
        places[name] = dotted
    return places


@cache
def plugins(kind: str) -> dict[str, EntryPoint]:
    """Name -> entry point of the methods that other packages announce, `name = package.module` or
    `name = package.module:Class`, as far as their declarations can be read.

    Of two of the same name the first counts: ours before others', others' in the order of sys.path.
    """
    usable: dict[str, EntryPoint] = {}
    for point in every_entry_point().select(group=KINDS[kind].entry_points):
        if point.name in own_modules(kind):
            warn_of_plugin(kind, point, f"luthier has a {kind} of this name")
        elif point.name in usable:
            if point.value != usable[point.name].value:
                first = package_of(usable[point.name])
                warn_of_plugin(kind, point, f"package '{first}' announces another one, which is used")
        else:
            try:
                read_card(kind, point.name, *parts_of(point))
            except Exception as error:
                warn_of_plugin(kind, point, error)
            else:
                usable[point.name] = point
    return usable


def parts_of(point: EntryPoint) -> tuple[str, str]:
    """The module and the class that an entry point names; "" where it names no class."""
    module, _, attribute = point.value.partition(":")
    return module.strip(), attribute.strip()


def package_of(point: EntryPoint) -> str:
    """The name of the installed package that announces a method."""
    return getattr(point.dist, "name", "(unknown)")


def warn_of_plugin(kind: str, point: EntryPoint, error: Exception | str) -> None:
    """One line about a method of another package that cannot be used, once."""
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    method = f"{kind} '{point.name}' ({point.value}) of package '{package_of(point)}'"
    _warn_once(f"{method} cannot be used: {reason}")


@cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, PluginWarning, stacklevel=4)


@cache
def every_entry_point() -> Any:
    """Of all installed packages: each call reads a file of each of them."""
    return entry_points()


def names(kind: str) -> list[str]:
    """Every method of a kind, in alphabetical order."""
    return sorted(modules(kind))


def module_of(kind: str, name: str) -> str:
    """The module of a method; a sentence with the nearest name where there is none."""
    places = modules(kind)
    if isinstance(name, str) and name in places:
        return places[name]
    if isinstance(name, str) and name in former_names(kind):
        return places[former_names(kind)[name]]
    raise RecipeError(f"there is no {kind} '{shortened(name)}'{nearest(kind, str(name))}")


def nearest(kind: str, name: str) -> str:
    """What a name that a kind does not have may mean: the same in other letters, one of another kind, or one
    that is written alike.
    """
    plain = name.casefold().replace("-", "_")
    if plain in modules(kind):
        return f"; did you mean '{plain}'?"
    others = [other for other in KINDS if plain in modules(other)]
    if others:
        return f"; '{plain}' is the name of a method of another kind ({', '.join(others)})"
    return did_you_mean(name, names(kind))


@cache
def former_names(kind: str) -> dict[str, str]:
    """Name that a method once had -> its name."""
    out = {}
    for c in cards(kind):
        for name in c.former:
            out[name] = c.name
    return out


@cache
def declared_words(kind: str) -> dict[str, Any]:
    """Every object of a declared type ("Column", "Capability") in method files: name -> object."""
    out: dict[str, Any] = {}
    for k in KINDS:
        for path in sorted((PACKAGE / "methods" / KINDS[k].folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if f"{kind}(" not in text:
                continue
            for node in ast.parse(text).body:
                value = getattr(node, "value", None)
                if isinstance(node, ast.Assign) and isinstance(value, ast.Call) and called(value) == kind:
                    word = declared(value, str(path))
                    out[str(word)] = word
    for k in KINDS:
        for name in plugins(k):
            brought = card(k, name)
            for word in sorted(brought.requires | brought.provides):
                if type(word) is DECLARED[kind]:
                    out.setdefault(str(word), word)
    return out


def called(node: ast.Call) -> str:
    """The name of the function that a call calls, without the module it is taken from; "" where it has
    none.
    """
    return getattr(node.func, "id", "") or getattr(node.func, "attr", "")


@cache
def find(kind: str, name: str) -> type:
    """The class of a method. Imports the one file that the name points at."""
    module = module_of(kind, name)
    for point in plugins(kind).values():
        if module == parts_of(point)[0] and (name == point.name or name in card(kind, point.name).former):
            return plugin_class(kind, point)
    return class_in(importlib.import_module(module), kind)


def classes(kind: str) -> list[type]:
    """The classes of all methods of a kind, which imports each. Another package's that cannot be imported is
    left out, with a warning.
    """
    out = []
    for name in names(kind):
        try:
            out.append(find(kind, name))
        except Exception as error:
            if name not in plugins(kind):
                raise
            warn_of_plugin(kind, plugins(kind)[name], error)
    return out


def class_in(module: ModuleType, kind: str) -> type:
    """The class of a kind that a module declares."""
    for member in vars(module).values():
        own = isinstance(member, type) and member.__module__ == module.__name__
        if own and getattr(member, "kind", None) == kind:
            return member
    raise RecipeError(f"{module.__name__} declares no {kind}")


def plugin_class(kind: str, point: EntryPoint) -> type:
    """The class that another package announces, under its name there."""
    module, attribute = parts_of(point)
    try:
        loaded = importlib.import_module(module)
        cls = getattr(loaded, attribute) if attribute else class_in(loaded, kind)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        raise RecipeError(f"{kind} '{point.name}' ({point.value}) cannot be imported: {reason}") from error
    if getattr(cls, "kind", None) != kind:
        raise RecipeError(f"{point.value} is no {kind}")
    cls.name = point.name
    return cls


# ------------------------------------------------------------------------------------ what they declare


@cache
def card(kind: str, name: str) -> Card:
    """What a method's file declares, from its source alone."""
    module = module_of(kind, name)
    if name in plugins(kind):
        return read_card(kind, name, *parts_of(plugins(kind)[name]))
    return read_card(kind, name, module)


def read_card(kind: str, name: str, module: str, attribute: str = "") -> Card:
    """The declaration in a module, of one class there if `attribute` names one. Raises RuntimeError where
    there is none, or where it cannot be read.
    """
    if attribute:
        module, attribute = home_of(attribute, module)
    tree = syntax(module)
    cls, keywords = declaration(tree, kind, attribute)
    if cls is None:
        raise RuntimeError(f"{module} declares no {kind} {attribute}".rstrip())
    for key in keywords:
        if key not in KEYWORDS:
            raise RuntimeError(f"a declaration has no '{key}'{did_you_mean(key, KEYWORDS)}")
    about = ast.get_docstring(tree) or ""
    if attribute:
        about = ast.get_docstring(cls) or about
    lists = {}
    for key in ("requires", "provides", "removes", "metrics", "artifacts"):
        lists[key] = listed(keywords.get(key), module)
    rows = tuple((literal(keywords.get("row")) or "").split())
    coverage = {key: literal(keywords.get(key)) or "" for key in ("covers", "omits", "tests")}
    return Card(
        kind,
        name,
        module,
        " ".join(about.split("\n\n", 1)[0].split()),
        paper=literal(keywords.get("paper")),
        rows=rows,
        use_when=literal(keywords.get("use_when")) or "",
        former=tuple((literal(keywords.get("former")) or "").split()),
        default_rate=literal(keywords.get("default_rate")),
        rate_factor=literal(keywords.get("rate_factor")) or 1.0,
        requires=frozenset(lists["requires"]),
        provides=frozenset(lists["provides"]),
        removes=frozenset(lists["removes"]),
        metrics=tuple(lists["metrics"]),
        artifacts=tuple(lists["artifacts"]),
        coverage=coverage_of(rows, **coverage),
    )


def cards(kind: str | None = None, own: bool = False) -> list[Card]:
    """All declarations, of one kind or of every kind. own: without those of other packages."""
    out = []
    for k in [kind] if kind else KINDS:
        for name in names(k):
            if not own or name in own_modules(k):
                out.append(card(k, name))
    return out


def declaration(
    tree: ast.Module, kind: str, attribute: str = ""
) -> tuple[ast.ClassDef | None, dict[str, ast.expr]]:
    """The class that declares a method of a kind, the first or the one of this name; keyword -> expression
    of its decorator.
    """
    decorators = (kind, f"row_{kind}")
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or attribute not in ("", node.name):
            continue
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and called(mark) in decorators:
                return node, {k.arg: k.value for k in mark.keywords if k.arg}
    return None, {}


def literal(node: ast.expr | None) -> Any:
    """The value of a constant expression; None where there is none."""
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise RuntimeError(f"`{ast.unparse(node)}` is no plain value, so it cannot be declared") from None


def listed(node: ast.expr | None, module: str) -> list[Any]:
    """The words of `requires="a b"` or the declared objects of `requires=[A, B, *MORE]`."""
    if node is None:
        return []
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.split()
    if isinstance(node, ast.Starred):
        return listed(node.value, module)
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        items = []
        for item in node.elts:
            items += listed(item, module)
        return items
    if isinstance(node, ast.Name):
        home, name = home_of(node.id, module)
        value = assigned(name, home)
        if isinstance(value, ast.Call):
            return [named(name, home)]
        return listed(value, home)
    return [declared(node, module)]


def declared(node: ast.expr, module: str) -> Any:
    """The capability, column, metric or artifact that a call makes."""
    if isinstance(node, ast.Call) and called(node) in DECLARED:
        positional = [literal(a) for a in node.args]
        keywords = {k.arg: literal(k.value) for k in node.keywords if k.arg}
        return DECLARED[called(node)](*positional, **keywords)
    raise RuntimeError(
        f"{module}: `{ast.unparse(node)}` is not a declared Capability, Column, Metric or Artifact"
    )


@cache
def named(name: str, module: str) -> Any:
    """What a name of a module stands for: a call of a declared type."""
    return declared(assigned(name, module), module)


def assigned(name: str, module: str) -> ast.expr:
    """The expression that a module-level name stands for."""
    for node in syntax(module).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            if value is not None:
                return value
    raise RuntimeError(f"{module} has no {name}")


def home_of(name: str, module: str) -> tuple[str, str]:
    """The module that a name of a module is defined in, through `from ... import`, and its name there."""
    for node in syntax(module).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                return home_of(alias.name, imported_from(node, module))
    return module, name


def imported_from(node: ast.ImportFrom, module: str) -> str:
    """The dotted module that a `from ... import` of a module names."""
    if not node.level:
        return node.module or ""
    package = module.split(".")
    if source_of(module).name != "__init__.py":
        package.pop()
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, *filter(None, [node.module])])


@cache
def syntax(module: str) -> ast.Module:
    """The parsed source of a module."""
    return ast.parse(source_of(module).read_text(encoding="utf-8"))


def source_of(module: str) -> Path:
    """The file of a module, without importing the packages above it where they lie in folders."""
    package, *inner = module.split(".")
    if package == "luthier":
        path = PACKAGE.joinpath(*inner)
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    spec = importlib.util.find_spec(package)
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            raise RuntimeError(f"there is no module {module}")
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"there is no module {module}")
    return Path(spec.origin)


def did_you_mean(word: object, choices: Iterable[object]) -> str:
    """'; did you mean ...?' where something near exists, else what exists if that is short."""
    words = [str(c) for c in choices]
    own = shortened(word)
    near = [name for name in words if sorted(name) == sorted(own)]  # letters that changed places
    near = near or difflib.get_close_matches(own, words, 1, cutoff=0.55)
    if near:
        return f"; did you mean '{near[0]}'?"
    if 0 < len(words) <= 24:
        return f" (there is: {', '.join(sorted(words))})"
    return ""
