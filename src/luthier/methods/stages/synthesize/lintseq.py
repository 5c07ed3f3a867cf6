"""LintSeq: a program becomes a list of insertions, each of which leaves a program without new errors.

Backwards, a drawn line leaves with the lines that are indented under it, and after it every line at which the
linter finds an error that the whole program does not have, until nothing is left; forwards, the differences
between these states are the completion, joined by `separator`. `linter: false` deletes single drawn lines
instead, the paper's control (Piterbarg et al., 2024). Departs: the linter is a small one, syntax and
names that are bound nowhere, in the place of pylint's errors.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, text_of, without
from luthier.registry import stage
from luthier.sandbox.code import UNPARSABLE, extract_code, parse, tree_of

BLOCK = re.compile(r"expected an indented block .*on line (\d+)")
HUNK = re.compile(r"^@@ -\d+,0 \+(\d+),(\d+) @@$")
MODULE_NAMES = {*dir(builtins), "__file__", "__name__", "__doc__"}


@stage(
    paper="arXiv:2410.02749",
    row="lintseq",
    requires=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="answers are Python programs, and samples of a small model should differ more from each other.",
    costs="`sequences` rows for each row, each somewhat longer than its program.",
    covers="insertions by drawn deletions and a linter, several for each program, the control without a"
    " linter, and their way back to a program.",
    omits="pylint; the count of distinct programs that a tuned model writes was not measured here.",
    tests=[
        "methods/stages/synthesize/test_lintseq.py::test_edits_give_the_program_byte_for_byte",
        "methods/stages/synthesize/test_lintseq.py::test_no_state_has_a_new_error_and_most_of_the_controls_do",
    ],
)
class LintSeq(Stage):
    """Rows whose completion is a sequence of insertions; `applied` gives the program."""

    asks_model = False

    sequences: Annotated[int, Field(ge=1)] = 5  # for each program
    separator: str = "<|diff|>\n"  # between insertions
    linter: bool = True  # false: single drawn lines are deleted, whatever remains

    def __call__(self, rows, roles):
        rows, out = list(rows), []
        for row in rows:
            if not row.get("completions"):
                continue
            code = extract_code(text_of(roles, row["completions"][0]))
            if tree_of(code) is None or not code.strip():
                continue
            turns = not isinstance(row["completions"][0], str)
            for number in range(self.sequences):
                rng = roles.clock.rng(self.name, row["id"], number, at=0)
                text: Any = self.separator.join(insertions(code, states(code, rng, self.linter)))
                completion = [{"role": "assistant", "content": text}] if turns else text
                new = {**without(row, "scores"), "completions": [completion]}
                out.append({**new, "id": f"{row['id']}/{number}"})
        programs = len(out) // self.sequences
        self.left(roles, len(rows) - programs, len(rows), "they hold no Python program")
        return out


def states(code: str, rng: torch.Generator, linter: bool = True) -> list[list[int]]:
    """Numbers of the lines that are there, from none to all of them."""
    lines = code.split("\n")
    allowed = {message for _, message in errors(code)}
    current = list(range(len(lines)))
    out = [current]
    while current:
        drawable = [k for k in current if lines[k].strip() and not lines[k].lstrip().startswith("#")]
        if not drawable:
            current = []
        else:
            line = drawable[int(torch.randint(len(drawable), (1,), generator=rng))]
            if linter:
                current = clean(without_block(current, lines, line), lines, allowed)
            else:
                current = [k for k in current if k != line]
        out.append(current)
    return out[::-1]


def without_block(current: Sequence[int], lines: Sequence[str], line: int) -> list[int]:
    """Without a line and what is indented under it."""
    depth, out, inside = indentation(lines[line]), [], False
    for k in current:
        if k == line:
            inside = True
            continue
        if inside and lines[k].strip() and indentation(lines[k]) <= depth:
            inside = False
        if not inside:
            out.append(k)
    return out


def clean(current: list[int], lines: Sequence[str], allowed: set[str]) -> list[int]:
    """Without the lines of errors that are not allowed, again and again."""
    while current:
        code = "\n".join(lines[k] for k in current)
        new = [line for line, message in errors(code) if message not in allowed]
        if not new:
            return current
        for line in [current[min(place, len(current)) - 1] for place in new]:
            if line in current:
                current = without_block(current, lines, line)
    return current


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def errors(code: str) -> list[tuple[int, str]]:
    """(line from 1, message) of what is wrong: an error of syntax, else names that are bound nowhere."""
    try:
        tree = parse(code)
        table = symtable.symtable(code, "<code>", "exec")
    except SyntaxError as error:
        block = BLOCK.search(error.msg or "")
        return [(max(1, int(block[1]) if block else error.lineno or 1), "syntax")]
    except UNPARSABLE:
        return [(1, "syntax")]
    unbound = set(unbound_names(table, table))
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in unbound and isinstance(node.ctx, ast.Load):
            out.append((node.lineno, f"undefined name {node.id}"))
    return out


def unbound_names(table: symtable.SymbolTable, module: symtable.SymbolTable) -> Iterator[str]:
    """Names that are read as global ones and that no line binds."""
    at_top = {symbol.get_name() for symbol in module.get_symbols() if binds(symbol)}
    for symbol in table.get_symbols():
        name = symbol.get_name()
        reads = symbol.is_referenced() and (symbol.is_global() or table is module) and not binds(symbol)
        if reads and name not in at_top and name not in MODULE_NAMES:
            yield name
    for child in table.get_children():
        yield from unbound_names(child, module)


def binds(symbol: symtable.Symbol) -> bool:
    return symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()


def insertions(code: str, steps: Sequence[Sequence[int]]) -> list[str]:
    """Unified differences, without context, between each state and the next."""
    lines, out = code.split("\n"), []
    for before, after in pairwise(steps):
        there, hunks, old = {*before}, [], 0
        place = 0
        while place < len(after):
            if after[place] in there:
                old, place = old + 1, place + 1
                continue
            first = place
            while place < len(after) and after[place] not in there:
                place += 1
            hunks.append(f"@@ -{old},0 +{first + 1},{place - first} @@\n")
            hunks += [f"+{lines[k]}\n" for k in after[first:place]]
        out.append("".join(hunks))
    return out


def applied(edits: Sequence[str]) -> str:
    """The program that insertions make, in order. Raises ValueError where one is malformed."""
    lines: list[str] = []
    for edit in edits:
        body = edit.split("\n")
        place = 0
        while place < len(body):
            head = HUNK.match(body[place])
            if head is None:
                if body[place] == "" and place == len(body) - 1:
                    break
                raise ValueError(f"no insertion begins at {body[place]!r}")
            first, count = int(head[1]), int(head[2])
            new = body[place + 1 : place + 1 + count]
            if len(new) < count or not all(line.startswith("+") for line in new):
                raise ValueError(f"{body[place]} is not followed by {count} new lines")
            lines[first - 1 : first - 1] = [line[1:] for line in new]
            place += 1 + count
    return "\n".join(lines)
