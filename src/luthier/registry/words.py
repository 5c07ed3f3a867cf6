"""What methods declare beside themselves: capabilities, columns of rows, metrics and files.

Each is declared once, at the top of the file that brings it, and required by importing that object:

    LINE_MASK = Column("line_mask", per="token", says="marks of the lines that differ")

    @stage(provides=[LINE_MASK])

A capability and a column are strings, so that a set of them is a set of names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


class Capability(str):
    """Something that one part of a recipe requires and another provides.

    says: how it reads behind "requires". advice: what to write in the recipe where nothing provides it.
    """

    says: str
    advice: str

    def __new__(cls, name: str, says: str = "", advice: str = "") -> Capability:
        self = super().__new__(cls, name)
        self.says, self.advice = says, advice
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.says, self.advice


class Column(Capability):
    """A column of the rows. per: what it has one value for: a row, or each completion of a row, or each token
    of each completion.
    """

    per: Literal["row", "completion", "token"]

    def __new__(
        cls, name: str, per: Literal["row", "completion", "token"] = "row", says: str = "", advice: str = ""
    ) -> Column:
        self = super().__new__(cls, name, says or f"rows with a column `{name}`", advice)  # type: ignore[misc]
        self.per = per
        return self  # type: ignore[return-value]

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.per, self.says, self.advice


@dataclass(frozen=True)
class Metric:
    """A number that an evaluator measures, and how it is shown.

    name: as in reports; `retention_loss/*` stands for one number a skill. label: for people. unit: "", "%",
    "nats", "GFLOP", "MB", "s", ... better: which way is better, None where neither is.
    """

    name: str
    label: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    says: str = ""


@dataclass(frozen=True)
class Artifact:
    """A file that a method leaves in a run's folder, as a glob pattern; it goes when the folder is cleared."""

    pattern: str
    says: str = ""
