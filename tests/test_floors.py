"""The house is built by floors: every package imports only from those below it, no files import in a circle,
and no name is a participle.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from helpers.paths import ROOT

SOURCE = ROOT / "src" / "luthier"


BASE, METHODS = "methods/_base", "methods"


FLOORS = (  # the lowest first
    *(
        "errors",
        "version",
        "clock",
        "processes",
        "compat",
        "storage",
        "registry",
        BASE,
        "sandbox",
        "recipe",
        "data",
        "text",
    ),
    *("kernels", "model", "train", "programs", "report", METHODS, "interop", "run", "study", "serve", "toy"),
    *("studio", "tools", "cli", "__main__", "__init__"),
)


PARTICIPLES = set(
    "said told asked kept found made seen given wanted"
    " tried went shown held known heard met felt gone got".split()
)


FILES = sorted(SOURCE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = ("luthier", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def for_types_only(nodes: list[ast.AST]) -> set[int]:
    """Nodes below `if TYPE_CHECKING`."""
    out = set()
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            out |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    return out


@cache
def read(path: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """What a file imports, and the names that it chooses; parsed once."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return list(imports(path, nodes)), list(stored_names(nodes))


def imports(path: Path, nodes: list[ast.AST]) -> Iterator[str]:
    """Modules of luthier that a file imports at run time, within functions too."""
    skipped = for_types_only(nodes)
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "luthier")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            if base.split(".")[0] == "luthier":
                for alias in node.names:
                    whole = f"{base}.{alias.name}"
                    yield whole if whole in MODULES else base


def floor_of(module: str) -> str:
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    if parts[0] == METHODS:
        return BASE if parts[-1] == "_base" else METHODS
    return parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_imports_only_from_floors_below(path):
    own = floor_of(module_of(path))
    for module in read(path)[0]:
        other = floor_of(module)
        if other != own:
            assert FLOORS.index(other) < FLOORS.index(own), f"{own} may not import {module}"
            assert other != METHODS, f"{module}: a method is reached by name, through the registry"


def test_no_files_import_in_a_circle():
    graph = {}
    for module, path in MODULES.items():
        graph[module] = {other for other in read(path)[0] if other in MODULES and other != module}
    while graph:  # take away what imports nothing that is left, until nothing is left
        leaves = {module for module, others in graph.items() if not others & graph.keys()}
        assert leaves, f"these import each other: {', '.join(sorted(graph))}"
        graph = {module: others for module, others in graph.items() if module not in leaves}


def stored_names(nodes: list[ast.AST]) -> Iterator[tuple[str, int]]:
    """Names that the code chooses: functions, classes, parameters, variables, attributes."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_names_are_nouns(path):
    for name, line in read(path)[1]:
        assert name.strip("_") not in PARTICIPLES, f"line {line}: '{name}' says nothing by itself"
