"""What is said of a method to people: help for its settings, their defaults, its page."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any

from luthier.registry.build import spec
from luthier.registry.kinds import KINDS


@cache
def helps(cls: type) -> dict[str, str]:
    """Setting -> the comment beside it, or on the lines above it; a family's settings are explained there."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base) and "__annotations__" in vars(base):
            out |= field_comments(inspect.cleandoc(inspect.getsource(base)))
    return out


def field_comments(source: str) -> dict[str, str]:
    """Field -> its comment, from the source of a class."""
    beside, above = comments(source)
    out = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign):
            out[node.target.id] = beside.get(node.end_lineno or 0) or block_above(node.lineno, above)
    return out


def comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Line -> comment: of those behind code, and of those that have the line to themselves."""
    beside: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines = alone if token.line.lstrip().startswith("#") else beside
            lines[token.start[0]] = token.string.lstrip("# ").strip()
    return beside, alone


def block_above(line: int, alone: dict[int, str]) -> str:
    """The block of comment lines that ends just above a line, as one text."""
    words: list[str] = []
    while line - 1 in alone:
        line -= 1
        words.insert(0, alone[line])
    return " ".join(words)


def page(cls: type) -> str:
    """The docs page of a method in Markdown: what its file says, its paper, settings, what it requires."""
    lines = [
        f"# {cls.name}",
        "",
        inspect.getdoc(inspect.getmodule(cls)) or "",
        "",
        inspect.getdoc(cls) or "",
        "",
    ]
    if cls.paper and cls.paper.startswith("arXiv:"):
        number = cls.paper.removeprefix("arXiv:")
        lines += [f"Paper: [{cls.paper}](https://arxiv.org/abs/{number})", ""]
    elif cls.paper:
        lines += [f"Paper: {cls.paper}", ""]
    for label, words in (("Requires", cls.requires), ("Provides", cls.provides), ("Removes", cls.removes)):
        if words:
            lines += [f"{label}: {', '.join(f'`{w}`' for w in sorted(words))}.", ""]
    if fields(cls):
        lines += [*settings_table(cls), ""]
    language = "python" if cls.kind == "compiler" else "yaml"
    lines += [f"```{language}", KINDS[cls.kind].example.format(cls.name), "```", ""]
    return "\n".join(lines)


def settings_table(cls: type) -> list[str]:
    """A Markdown table of a method's settings."""
    lines = ["| setting | default | meaning |", "| - | - | - |"]
    for f in fields(cls):
        help_text = escape(helps(cls).get(f.name, ""))
        lines.append(f"| `{f.name}` | `{escape(default_of(f))}` | {help_text} |")
    return lines


def escape(text: str) -> str:
    """Markdown ends a cell at a bar, even within code."""
    return text.replace("|", r"\|")


def default_of(f: Any) -> str:
    """The default of a setting as YAML users write it; `required` where there is none."""
    if f.default_factory is not MISSING:
        return format_value(f.default_factory())
    if f.default is MISSING:
        return "required"
    return format_value(spec(f.default))


def format_value(value: Any) -> str:
    """A value as YAML users write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(format_value, value)) + "]"
    return str(value)
