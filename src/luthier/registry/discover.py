"""Which methods there are: files of the wing methods/, and what other packages announce as entry points.

A method's file name is its name in YAML. `card` reads a declaration from the source, without importing it, so
that listings stay fast; `find` imports the one file that a name points at.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from luthier.errors import RecipeError
from luthier.registry.kinds import KINDS
from luthier.registry.words import Artifact, Capability, Column, Metric

PACKAGE = Path(__file__).parents[1]
DECLARED = {"Capability": Capability, "Column": Column, "Metric": Metric, "Artifact": Artifact}


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
    requires: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    removes: frozenset[str] = frozenset()
    metrics: tuple[Metric, ...] = ()
    artifacts: tuple[Artifact, ...] = ()


# ------------------------------------------------------------------------------------ where they are


@cache
def modules(kind: str) -> dict[str, str]:
    """Name -> dotted module of every method of a kind: our folder, then what other packages announce."""
    if kind not in KINDS:
        raise RecipeError(f"there is no kind of method '{kind}'{did_you_mean(kind, KINDS)}")
    places = dict(own_modules(kind))
    for point in announced(kind):
        places.setdefault(point.name, point.value.partition(":")[0])
    return places


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
def announced(kind: str) -> tuple[EntryPoint, ...]:
    """Entry points of a kind, `name = package.module` or `name = package.module:Class`, whose file is there.

    One that cannot be read is named in a warning, and the rest works.
    """
    usable = []
    for point in every_entry_point().select(group=KINDS[kind].entry_points):
        try:
            source_of(point.value.partition(":")[0])
        except Exception as error:
            warn_of_plugin(kind, point.name, error)
        else:
            usable.append(point)
    return tuple(usable)


def warn_of_plugin(kind: str, name: str, error: Exception) -> None:
    """One line about a method of another package that cannot be used."""
    reason = str(error).strip().split("\n")[0]
    warnings.warn(f"{kind} '{name}' of an installed package cannot be used: {reason}", stacklevel=2)


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
    raise RecipeError(f"there is no {kind} '{name}'{did_you_mean(name, names(kind))}")


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
    out = {}
    for k in KINDS:
        for path in sources(k):
            text = path.read_text(encoding="utf-8")
            if f"{kind}(" not in text:
                continue
            for node in ast.parse(text).body:
                value = getattr(node, "value", None)
                if isinstance(node, ast.Assign) and isinstance(value, ast.Call) and called(value) == kind:
                    word = declared(value, str(path))
                    out[str(word)] = word
    return out


def called(node: ast.Call) -> str:
    """The name of the function that a call calls; "" where it has none."""
    return node.func.id if isinstance(node.func, ast.Name) else ""


def sources(kind: str) -> list[Path]:
    """Every file of a kind: methods, families, the protocol, and those of other packages."""
    own = sorted((PACKAGE / "methods" / KINDS[kind].folder).rglob("*.py"))
    return own + [source_of(point.value.partition(":")[0]) for point in announced(kind)]


@cache
def find(kind: str, name: str) -> type:
    """The class of a method. Imports the one file that the name points at."""
    module = module_of(kind, name)
    for point in announced(kind):
        if point.name == name and point.value.partition(":")[0] == module:
            return plugin_class(kind, point)
    return class_in(importlib.import_module(module), kind)


def class_in(module: ModuleType, kind: str) -> type:
    """The class of a kind that a module declares."""
    for member in vars(module).values():
        own = isinstance(member, type) and member.__module__ == module.__name__
        if own and getattr(member, "kind", None) == kind:
            return member
    raise RecipeError(f"{module.__name__} declares no {kind}")


def plugin_class(kind: str, point: EntryPoint) -> type:
    """The class that another package announces, `package.module` or `package.module:Class`, under its
    name.
    """
    module, _, attribute = point.value.partition(":")
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
    tree = syntax(module)
    summary = " ".join((ast.get_docstring(tree) or "").split("\n\n", 1)[0].split())
    keywords = declaration(tree, kind)
    lists = {}
    for key in ("requires", "provides", "removes", "metrics", "artifacts"):
        lists[key] = listed(keywords.get(key), module)
    return Card(
        kind,
        name,
        module,
        summary,
        paper=literal(keywords.get("paper")),
        rows=tuple((literal(keywords.get("row")) or "").split()),
        use_when=literal(keywords.get("use_when")) or "",
        former=tuple((literal(keywords.get("former")) or "").split()),
        requires=frozenset(lists["requires"]),
        provides=frozenset(lists["provides"]),
        removes=frozenset(lists["removes"]),
        metrics=tuple(lists["metrics"]),
        artifacts=tuple(lists["artifacts"]),
    )


def cards(kind: str | None = None) -> list[Card]:
    """All declarations, of one kind or of every kind. A plugin that cannot be read is left out with a
    warning.
    """
    out = []
    for k in [kind] if kind else KINDS:
        for name in names(k):
            try:
                out.append(card(k, name))
            except Exception as error:
                if module_of(k, name).startswith("luthier."):
                    raise
                warn_of_plugin(k, name, error)
    return out


def declaration(tree: ast.Module, kind: str) -> dict[str, ast.expr]:
    """Keyword -> expression of the decorator that declares a method of a kind."""
    decorators = (kind, f"row_{kind}")
    for node in tree.body:
        for mark in getattr(node, "decorator_list", []):
            if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id in decorators:
                return {k.arg: k.value for k in mark.keywords if k.arg}
    return {}


def literal(node: ast.expr | None) -> Any:
    """The value of a constant expression; None where there is none."""
    return None if node is None else ast.literal_eval(node)


def listed(node: ast.expr | None, module: str) -> list[Any]:
    """The words of `requires="a b"` or the declared objects of `requires=[A, B]`."""
    if node is None:
        return []
    if isinstance(node, ast.Constant):
        return str(node.value).split()
    items = getattr(node, "elts", [])
    return [item.value if isinstance(item, ast.Constant) else declared(item, module) for item in items]


def declared(node: ast.expr, module: str) -> Any:
    """The capability, column, metric or artifact that an expression stands for."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in DECLARED:
        positional = [ast.literal_eval(a) for a in node.args]
        keywords = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
        return DECLARED[node.func.id](*positional, **keywords)
    if isinstance(node, ast.Name):
        return named(node.id, module)
    raise RuntimeError(
        f"{module}: `{ast.unparse(node)}` is not a declared Capability, Column, Metric or Artifact"
    )


@cache
def named(name: str, module: str) -> Any:
    """What a module-level name stands for: a call of a declared type, here or in the module it comes from."""
    for node in syntax(module).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        ):
            return declared(node.value, module)
        if isinstance(node, ast.ImportFrom) and node.module and any(a.name == name for a in node.names):
            return named(name, node.module)
    raise RuntimeError(f"{module} has no {name}")


@cache
def syntax(module: str) -> ast.Module:
    """The parsed source of a module."""
    return ast.parse(source_of(module).read_text(encoding="utf-8"))


def source_of(module: str) -> Path:
    """The file of a module; of ours without importing the packages above it."""
    package, *inner = module.split(".")
    if package == "luthier":
        path = PACKAGE.joinpath(*inner)
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"module {module} has no file")
    return Path(spec.origin)


def did_you_mean(word: object, choices: Iterable[object]) -> str:
    """'; did you mean ...?' where something near exists, else what exists if that is short."""
    words = [str(c) for c in choices]
    near = difflib.get_close_matches(str(word), words, 1, cutoff=0.55)
    if near:
        return f"; did you mean '{near[0]}'?"
    if 0 < len(words) <= 24:
        return f" (there is: {', '.join(sorted(words))})"
    return ""
