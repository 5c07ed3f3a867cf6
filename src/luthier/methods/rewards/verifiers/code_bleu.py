"""CodeBLEU of Python programs: how near a program is to a reference in tokens, syntax and flow of data.

The mean of four parts (Ren et al., 2020): BLEU of tokens; BLEU in which keywords weigh five times as much as
other tokens; the share of the reference's syntax subtrees that the program has, whatever its names; and the
share of the reference's data-flow edges, names being numbered in the order in which assignments are walked.
Departs: Python alone, by its own parser; BLEU is smoothed by one count for each order above the first, and
data flows between names, whichever assignment of them counts. A program that does not parse has neither
syntax nor flow.
"""

from __future__ import annotations

import ast
import hashlib
import keyword
import math
import re
from collections import Counter
from typing import Any

from luthier.methods.formats._base import ANSWER
from luthier.methods.rewards._base import Reward
from luthier.registry import reward
from luthier.sandbox.code import tree_of

TOKENS = re.compile(r"\w+|[^\w\s]")
OTHER = 0.2  # weight of a token that is no keyword, beside 1


@reward(
    paper="arXiv:2009.10297",
    row="monocoder",
    requires=[ANSWER],
    use_when="`answer` is a Python program and there are no tests: a program should be like it, not equal"
    " letter for letter.",
    costs="parsing each completion.",
    covers="CodeBLEU, for Python.",
    omits="CodeBLEU of C, C++ and Fortran, of which there is no parser here.",
    tests=["methods/rewards/verifiers/test_code_bleu.py::test_renamed_is_nearer_than_otherwise_computed"],
)
class CodeBleu(Reward):
    """From 0 to 1: the mean of the four parts."""

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """One score per text; `answer` may be a list of references, of which the nearest counts."""
        references = self.column(row, "answer")
        references = [references] if isinstance(references, str) else list(references)
        return [max(score(text, str(reference)) for reference in references) for text in texts]


def score(text: str, reference: str) -> float:
    """CodeBLEU of one program against one reference."""
    ours, theirs = TOKENS.findall(text), TOKENS.findall(reference)
    parts = [bleu(ours, theirs, even=True), bleu(ours, theirs, even=False)]
    tree, reference_tree = tree_of(text), tree_of(reference)
    both: list[tuple[Counter[Any], Counter[Any]]] = [
        (subtrees(reference_tree), subtrees(tree)),
        (edges(reference_tree), edges(tree)),
    ]
    for expected, present in both:
        shared = sum((expected & present).values())
        # a reference without any asks for nothing
        parts.append(shared / expected.total() if expected else float(tree is not None))
    return sum(parts) / len(parts)


def bleu(ours: list[str], theirs: list[str], even: bool) -> float:
    """BLEU-4 of tokens; even: all single tokens weigh alike."""
    if not ours or not theirs:
        return float(ours == theirs)
    logs = []
    for n in range(1, 5):
        have, want = grams(ours, n), grams(theirs, n)
        hits = total = 0.0
        for gram, count in have.items():
            weight = 1.0 if even or n > 1 or keyword.iskeyword(gram[0]) else OTHER
            hits += weight * min(count, want[gram])
            total += weight * count
        smooth = 0.0 if n == 1 else 1.0
        logs.append(math.log(max(hits + smooth, 1e-9) / max(total + smooth, 1e-9)))
    brief = min(0.0, 1 - len(theirs) / len(ours))
    return math.exp(sum(logs) / 4 + brief)


def grams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    """Each run of n tokens, and how often it is there."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def subtrees(tree: ast.AST | None) -> Counter[str]:
    """The shapes of all subtrees that are more than a leaf: kinds of nodes, without names and values. A shape
    is a digest, so that a program may be as deep as Python reads it.
    """
    out: Counter[str] = Counter()
    if tree is None:
        return out
    shapes: dict[int, str] = {}
    nodes = [tree]
    for node in nodes:  # parents first; it grows meanwhile
        nodes += children(node)
    for node in reversed(nodes):
        shape = type(node).__name__
        inner = [shapes[id(child)] for child in children(node)]
        if inner:
            shape = hashlib.sha256(f"{shape}({' '.join(inner)})".encode()).hexdigest()
            out[shape] += 1
        shapes[id(node)] = shape
    return out


def children(node: ast.AST) -> list[ast.AST]:
    return [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)]


def edges(tree: ast.AST | None) -> Counter[tuple[str, ...]]:
    """(name, name that its value is computed from) of each assignment, names numbered as they are met."""
    out: Counter[tuple[str, ...]] = Counter()
    numbers: dict[str, str] = {}

    def numbered(node: ast.AST) -> list[str]:
        names = [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)]
        return [numbers.setdefault(name, f"v{len(numbers)}") for name in names]

    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.arg):
            numbers.setdefault(node.arg, f"v{len(numbers)}")
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign) and value is not None:
            targets = [name for target in node.targets for name in numbered(target)]
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)) and value is not None:
            targets = numbered(node.target)
        elif isinstance(node, ast.For):
            targets, value = numbered(node.target), node.iter
        elif isinstance(node, ast.Return) and value is not None:
            targets = ["return"]
        else:
            continue
        sources = numbered(value)
        for target in targets:
            for source in sources:
                out[target, source] += 1
    return out
