"""Solutions that the policy finds itself, right ones and right beginnings, beside the reference.

A solution is a program of assignments, `name = arithmetic` a line; its result is the value of the last line.
Each row has a buffer that opens with its reference. The policy writes programs, from nothing or behind a
right beginning of the buffer, and they are executed. A program with the reference's result is right; of any
other the longest beginning counts whose state, the set of its variables' values, is one that a program of
the buffer passes through. Both enter the buffer where they are new and no longer than what they are
equivalent to. A beginning is stored as token ids without an end, so that training does not teach to stop
there.

Programs are compared with their variables renamed in order. Nothing is handed to an interpreter: lines are
evaluated here, and hold numbers, variables, + - * / // % **, abs, min, max, round, int and float alone.
Departs: a beginning enters only where it ends between tokens; a longer one replaces its own beginnings.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import (
    CACHED_LOGPROBS,
    OLD_LOGPROBS,
    SAMPLES,
    TRUNCATED,
    Stage,
    pieces,
    text_of,
    without,
)
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import Range, stage
from luthier.storage.files import read_rows
from luthier.storage.layout import ROWS

State = frozenset[float]
LONGEST = 500  # characters of a line that are read
LARGEST = 1e15  # a number beyond it is none: powers of powers take no time here
OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: math.pow,
}
FUNCTIONS: dict[str, Any] = {
    **{"abs": abs, "min": min, "max": max, "round": round, "int": int, "float": float},
}


@stage(
    example={"n": 2, "max_new_tokens": 3},
    paper="arXiv:2205.14318",
    row="self-sampled-partial-solutions",
    requires=[COMPLETIONS, GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES, OLD_LOGPROBS, CACHED_LOGPROBS, SAMPLES, TRUNCATED],
    use_when="problems are solved by short programs of arithmetic and have one reference each, while many"
    " solutions are right.",
    costs="`n` samples of each row; executing them takes next to nothing.",
    covers="fully and partially right solutions by state, the filters for length and duplicates, and samples"
    " that begin at beginnings of the buffer.",
    omits="programs with other lines than assignments of arithmetic (MathQA's and GSM8K's have no others).",
    tests=[
        "methods/stages/rollout/test_solution_buffer.py::test_a_beginning_is_what_brute_force_finds",
        "methods/stages/rollout/test_solution_buffer.py::test_the_buffer_collects_an_alternative",
        "methods/stages/rollout/test_solution_buffer.py::test_a_beginning_is_sampled_from_and_has_no_end",
    ],
)
class SolutionBuffer(Stage):
    """Column `completions`: the reference, then what was found, whole solutions as text and beginnings as
    token ids. Rows whose reference is no such program stay as they are. Measures solutions and beginnings
    (of a row, beside its reference).
    """

    n: Annotated[int, Field(ge=1), Range(2, 64, log=True)] = 8  # programs of each row
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a program
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    partial: bool = True  # keep right beginnings too, and sample from them
    most: Annotated[int, Field(ge=1)] | None = None  # solutions of a row at most; null: all
    buffer: str | None = None  # folder of the run whose rows hold the buffers so far; null: they begin here
    draw: int = 0  # number of the draw; another number gives other samples

    def __call__(self, rows, roles):
        earlier = self.earlier()
        rows = [{**row, "completions": earlier.get(str(row["id"]), row["completions"])} for row in rows]
        buffers = [Buffer([text_of(roles, one) for one in row["completions"]]) for row in rows]
        entries = [list(row["completions"]) for row in rows]
        requests = []
        for place, (row, buffer) in enumerate(zip(rows, buffers, strict=True)):
            if buffer.result is not None:
                requests += self.requests(place, row, roles)
        how = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        for sample in Rollout(n=1, **how, draw=self.draw)(requests, roles) if requests else ():
            place, (ids,) = sample["place"], sample["completions"]
            self.add(entries[place], buffers[place], sample["begun"] + ids, sample["begun"], roles)
        strange = sum(buffer.result is None for buffer in buffers)
        if strange:
            self.warn(
                roles,
                f"{strange} of {len(rows)} rows have a reference that is no program of assignments; they"
                " stay as they are",
            )
        out = []
        for row, several in zip(rows, entries, strict=True):
            out.append({**without(row), "completions": several[: self.most]})
        self.report(out, roles)
        return out

    def earlier(self) -> dict[str, list[Any]]:
        """The buffers so far, by the row's id."""
        if self.buffer is None:
            return {}
        path = Path(self.buffer) / ROWS
        if not path.is_file():
            raise RecipeError(f"stage 'solution_buffer': {self.buffer} has no {ROWS}")
        return {str(row["id"]): row["completions"] for row in read_rows(path)}

    def requests(self, place: int, row: dict, roles: Any) -> list[dict]:
        """What the policy is asked for: every second program opens with a beginning of the buffer, in
        turn.
        """
        beginnings = [one for one in row["completions"] if is_beginning(one)]
        out = []
        for k in range(self.n):
            begun = beginnings[k // 2 % len(beginnings)] if beginnings and k % 2 else []
            one = {**without(row), "id": f"{row['id']}/{k}", "place": place, "begun": begun}
            if begun:
                one["prefix"] = row.get("prefix", "") + text_of(roles, begun)
            out.append(one)
        return out

    def add(self, entries: list[Any], buffer: Buffer, ids: list[int], begun: list[int], roles: Any) -> None:
        """Put a sample into a row's buffer where it belongs there. ids: with `begun`, what it began with."""
        text = text_of(roles, begun) + text_of(roles, ids[len(begun) :])
        size = buffer.size(text)
        if size is None:
            return
        lines = lines_of(text)[:size]
        entry: Any = "\n".join(lines)
        if size < len(lines_of(text)) or not buffer.right(text):
            entry = beginning(roles, ids, lines) if self.partial else None
        if not entry:
            return
        for place in buffer.beginnings_of(lines):
            if place and is_beginning(entries[place]):
                del buffer.texts[place], entries[place]
        buffer.texts.append("\n".join(lines))
        entries.append(entry)

    def report(self, rows: Sequence[dict], roles: Any) -> None:
        """Measure what the buffers hold beside their references."""
        if rows:
            ends = [sum(map(is_beginning, row["completions"])) for row in rows]
            total = sum(len(row["completions"]) - 1 for row in rows)
            begun = sum(ends) / len(rows)
            self.measure(roles, solutions=total / len(rows) - begun, beginnings=begun)


class Buffer:
    """The programs of a row, as texts; the first is the reference."""

    def __init__(self, texts: list[str]):
        self.texts = texts
        steps = execute(texts[0]) if texts else []
        whole = bool(steps) and len(steps) == len(lines_of(texts[0]))
        self.result = steps[-1][1] if whole else None

    def right(self, text: str) -> bool:
        """Does a program run to its end, with the reference's result?"""
        steps = execute(text)
        if self.result is None or not steps or len(steps) < len(lines_of(text)):
            return False
        return math.isclose(steps[-1][1], self.result, rel_tol=1e-6, abs_tol=1e-9)

    def size(self, text: str) -> int | None:
        """How many lines of a program belong into the buffer: all of a right one, of another the longest
        beginning with a state of the buffer. None where that is there, or longer than what it equals.
        """
        names = normal(text)
        if self.right(text):
            others = [one for one in self.texts if self.right(one)]
            longest = max(len(lines_of(one)) for one in others)
            return len(names) if len(names) <= longest and names not in map(normal, others) else None
        lengths: dict[State, int] = {}
        for one in self.texts:
            for count, (state, _) in enumerate(execute(one), 1):
                lengths[state] = max(count, lengths.get(state, 0))
        for count, (state, _) in reversed([*enumerate(execute(text), 1)]):
            if state in lengths:
                new = all(normal(one)[:count] != names[:count] for one in self.texts)
                return count if new and count <= lengths[state] else None
        return None

    def beginnings_of(self, lines: Sequence[str]) -> list[int]:
        """Places of programs that these lines begin with, the last first."""
        whole = normal("\n".join(lines))
        places = []
        for place, text in enumerate(self.texts):
            names = normal(text)
            if names and names == whole[: len(names)]:
                places.append(place)
        return places[::-1]


def is_beginning(completion: Any) -> bool:
    """Is a completion given as token ids, without an end?"""
    return isinstance(completion, list) and bool(completion) and isinstance(completion[0], int)


def beginning(roles: Any, ids: Sequence[int], lines: Sequence[str]) -> list[int] | None:
    """The tokens that write these first lines and the end of the last one; None where none end there."""
    text = ""
    best = None
    for count, piece in enumerate(pieces(roles, ids), 1):
        text += piece
        if lines_of(text) == list(lines):
            best = list(ids[:count])
            if text.endswith("\n"):
                return best
    return best


def lines_of(text: str) -> list[str]:
    """Lines that say something."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def execute(text: str) -> list[tuple[State, float]]:
    """State and value behind each line, up to the first line that is no assignment of arithmetic."""
    variables: dict[str, float] = {}
    out = []
    for line in lines_of(text):
        try:
            name, expression = assignment(line)
            value = evaluate(expression, variables)
        except (ValueError, SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError):
            break
        variables[name] = value
        out.append((frozenset(float(f"{one:.9g}") for one in variables.values()), value))
    return out


def assignment(line: str) -> tuple[str, ast.expr]:
    """Variable and expression. Raises ValueError or SyntaxError where a line is no assignment."""
    body = ast.parse(line[:LONGEST]).body
    if len(body) != 1 or not isinstance(body[0], ast.Assign) or len(body[0].targets) != 1:
        raise ValueError("no assignment")
    target = body[0].targets[0]
    if not isinstance(target, ast.Name):
        raise ValueError("no variable")
    return target.id, body[0].value


def evaluate(node: ast.expr, variables: dict[str, float]) -> float:
    """The number that an expression stands for. Raises ValueError or ArithmeticError where it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        value = node.value
    elif isinstance(node, ast.Name) and node.id in variables:
        value = variables[node.id]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -evaluate(node.operand, variables)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](evaluate(node.left, variables), evaluate(node.right, variables))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
        value = FUNCTIONS[node.func.id](*[evaluate(one, variables) for one in node.args])
    else:
        raise ValueError("not arithmetic")
    if not abs(value) < LARGEST:
        raise OverflowError("too large, or no number")
    return value


def normal(text: str) -> list[str]:
    """The lines of a program with its variables named in order; a line that is no Python as it is written."""
    names: dict[str, str] = {}
    out = []
    for line in lines_of(text):
        try:
            tree = ast.parse(line[:LONGEST])
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            out.append(line)
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id not in FUNCTIONS:
                node.id = names.setdefault(node.id, f"v{len(names)}")
        out.append(ast.dump(tree))
    return out
