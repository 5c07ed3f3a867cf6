"""A refactoring that moves part of a function into a new one: does the program parse, and is there such a
function and a call of it?

-1 for a text that is no program, 0 for a program without a new function that it calls, 1 for one with. New
are functions that the row's own program, in `source`, does not define. Departs: the paper compiles Java and
detects refactorings by a tool; here Python's syntax tree says both, and behaviour is for `python_tests`.
"""

from __future__ import annotations

import ast

from luthier.methods.rewards._base import Reward
from luthier.registry import Column, reward
from luthier.sandbox.code import extract_code, tree_of

SOURCE_PROGRAM = Column(
    "source",
    says="the program before it is changed (column `source`)",
    example=("def f(x):\n    return x + 1\n",),
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@reward(
    paper="arXiv:2412.18035",
    requires=[SOURCE_PROGRAM],
    use_when="a model refactors Python functions by extracting new ones.",
    costs="parsing each completion.",
)
class ExtractMethod(Reward):
    """-1, 0 or 1."""

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        before = tree_of(str(self.column(row, "source")))
        old = set() if before is None else defined(before)
        return [self.score(old, extract_code(text)) for text in texts]

    def score(self, old: set[str], program: str) -> float:
        """One program; old: names of functions that were there before."""
        tree = tree_of(program)
        if tree is None or not tree.body:
            return -1.0
        return float(bool((defined(tree) - old) & called(tree)))


def defined(tree: ast.AST) -> set[str]:
    """Names of all functions of a program."""
    return {node.name for node in ast.walk(tree) if isinstance(node, FUNCTIONS)}


def called(tree: ast.AST) -> set[str]:
    """Names that a program calls from outside of the function of that name."""
    names = set()
    stack: list[tuple[ast.AST, str]] = [(tree, "")]
    while stack:
        node, function = stack.pop()
        if isinstance(node, ast.Call):
            target = node.func
            name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
            if name and name != function:
                names.add(name)
        inside = node.name if isinstance(node, FUNCTIONS) else function
        stack += [(child, inside) for child in ast.iter_child_nodes(node)]
    return names
