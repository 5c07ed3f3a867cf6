"""What is said of a method to people: help for its settings, their defaults, its page."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from luthier.registry.build import spec
from luthier.registry.declare import INTERNAL
from luthier.registry.kinds import KINDS
from luthier.registry.words import Metric

# contracts that say what a result depends on, where a method does not keep them
EXCEPTIONS = {
    "accumulation": "Depends on the size of micro-batches",
    "processes": "Depends on the number of processes",
}


@cache
def helps(cls: type) -> dict[str, str]:
    """Setting -> the comment beside it, or on the lines above it; a family's settings are explained there."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base) and "__annotations__" in vars(base):
            out |= field_comments(textwrap.dedent(inspect.getsource(base)))
    return out


def field_comments(source: str) -> dict[str, str]:
    """Field -> its comment, from the source of a class."""
    beside, above = comments(source)
    out = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar"):
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
    """The docs page of a method in Markdown: when to use it, what it does, what it costs, its settings."""
    lines = [f"# {cls.name}", "", *opening(cls), *text_of(cls), *facts(cls)]
    if settings(cls):
        lines += ["## Settings", "", *settings_table(cls), ""]
    lines += example(cls)
    return "\n".join(lines)


def opening(cls: type) -> list[str]:
    """When to use it, in one or two sentences."""
    if not cls.use_when:
        return []
    return [f"Use it when {cls.use_when}", ""]


def text_of(cls: type) -> list[str]:
    """What its file and its class say of it."""
    return [inspect.getdoc(inspect.getmodule(cls)) or "", "", inspect.getdoc(cls) or "", ""]


def facts(cls: type) -> list[str]:
    """What it costs, which learning rate to start with, what it requires, provides, removes, measures and
    leaves in a run's folder, its paper.
    """
    lines = []
    if cls.costs:
        lines.append(f"- Costs: {cls.costs}")
    for word in sorted(cls.requires):
        costs = getattr(word, "costs", "")
        if costs:
            lines.append(f"- Costs of `{word}`: {costs}")
    if cls.default_rate is not None:
        lines.append(f"- Default learning rate: {cls.default_rate:g}, where a recipe names none")
    if cls.rate_factor != 1:
        lines.append(f"- Default learning rate: {cls.rate_factor:g} times that of the tuner")
    if cls.starting_rate:
        lines.append(f"- Learning rate: {cls.starting_rate}")
    declared = {
        "Requires": sorted(map(describe_word, cls.requires)),
        "Provides": sorted(map(describe_word, cls.provides)),
        "Removes": sorted(map(describe_word, cls.removes)),
        "Measures": list(map(describe_metric, cls.metrics)),
        "Writes": [with_meaning(artifact.pattern, artifact.says) for artifact in cls.artifacts],
    }
    for label, items in declared.items():
        if items:
            lines.append(f"- {label}: {', '.join(items)}.")
    contract = getattr(cls, "contract", None)
    for test, label in EXCEPTIONS.items():
        if isinstance(contract, dict) and test in contract:
            lines.append(f"- {label}: {contract[test]}.")
    if cls.paper:
        lines.append(f"- Paper: {paper_link(cls.paper)}")
    for row, coverage in cls.coverage.items():
        lines.append(f"- Of the paper (`{row}`): {coverage.covers}")
        if coverage.omits:
            lines.append(f"- Not there (`{row}`): {coverage.omits}")
    return [*lines, ""]


def describe_word(word: str) -> str:
    """A capability or column, with what it means."""
    return with_meaning(str(word), getattr(word, "says", ""))


def describe_metric(metric: Metric) -> str:
    """A metric with its label, its unit and which way is better."""
    about = [metric.label]
    if metric.unit:
        about.append(f"in {metric.unit}")
    if metric.better:
        about.append(f"{metric.better} is better")
    return with_meaning(metric.name, ", ".join(about))


def with_meaning(name: str, meaning: str) -> str:
    """A name as code, with what it means in brackets where that is declared."""
    if meaning:
        return f"`{name}` ({meaning})"
    return f"`{name}`"


def paper_link(paper: str) -> str:
    """A paper as a Markdown link; what is no arXiv number or DOI as it is."""
    if paper.startswith("arXiv:"):
        return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
    if paper.startswith("doi:"):
        return f"[{paper}](https://doi.org/{paper.removeprefix('doi:')})"
    return paper


def example(cls: type) -> list[str]:
    """How a recipe names it."""
    language = "yaml"
    if cls.kind == "compiler":
        language = "python"
    return [f"```{language}", KINDS[cls.kind].example.format(cls.name), "```", ""]


def settings(cls: type) -> list[Any]:
    """The fields that a user sets: all but those that luthier fills in itself."""
    try:
        hints = get_type_hints(cls, include_extras=True)
    except NameError:  # a type that is imported for type checkers only
        hints = {}
    public = []
    for f in fields(cls):
        marks = getattr(hints.get(f.name), "__metadata__", ())
        if INTERNAL not in marks:
            public.append(f)
    return public


def settings_table(cls: type) -> list[str]:
    """A Markdown table of a method's settings, without internal ones."""
    lines = ["| setting | default | meaning |", "| - | - | - |"]
    for f in settings(cls):
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
