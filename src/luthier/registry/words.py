"""What methods declare beside themselves: capabilities, columns of rows, metrics and files.

Each is declared once, at the top of the file that brings it, and required by importing that object:

    LINE_MASK = Column("line_mask", per="token", says="marks of the lines that differ")

    @stage(provides=[LINE_MASK])

A capability and a column are strings, so that a set of them is a set of names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import Self


class Capability(str):
    """Something that one part of a recipe requires and another provides.

    says: how it reads behind "requires". advice: what to write in the recipe where nothing provides it.
    of_rows: whether rows bring it (as a column does), and not a model or a method. costs: memory and time
    that providing it takes, for the pages of the methods that require it.
    """

    says: str
    advice: str
    of_rows: bool
    costs: str

    def __new__(
        cls, name: str, says: str = "", advice: str = "", of_rows: bool = False, costs: str = ""
    ) -> Self:
        self = super().__new__(cls, name)
        self.says, self.advice, self.of_rows, self.costs = says, advice, of_rows, costs
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.says, self.advice, self.of_rows, self.costs


class Column(Capability):
    """A column of the rows.

    per: what it has one value for: a row, each completion of a row, or each supervised token of each
    completion. example: values that tests write into it, in turn; a column that two or more kinds of tests
    need has some. former: its name in version 0.1.
    """

    per: Literal["row", "completion", "token"]
    example: tuple[Any, ...]
    former: str

    def __new__(
        cls,
        name: str,
        per: Literal["row", "completion", "token"] = "row",
        says: str = "",
        advice: str = "",
        example: tuple[Any, ...] = (),
        former: str = "",
    ) -> Self:
        if per not in ("row", "completion", "token"):
            raise ValueError(f"column '{name}' is per row, completion or token, not per {per}")
        self = super().__new__(cls, name, says or f"rows with a column `{name}`", advice, of_rows=True)
        self.per, self.example, self.former = per, example, former
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.per, self.says, self.advice, self.example, self.former


@dataclass(frozen=True)
class Metric:
    """A number that an evaluator measures, and how it is shown.

    name: as in reports; parts of it are called `name/part`. label: for people. unit: "%" for a share, which
    is shown in percent and whose changes are in points. better: which way is better; None where neither is.
    rank: the lower, the earlier in tables. former: its name in version 0.1.
    """

    name: str
    label: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    rank: int = 50
    former: str = ""

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower", None):
            raise ValueError(f"metric '{self.name}': better is higher, lower or None, not {self.better!r}")

    @property
    def is_share(self) -> bool:
        return self.unit == "%"

    @property
    def higher_is_better(self) -> bool | None:
        return None if self.better is None else self.better == "higher"


@dataclass(frozen=True)
class Artifact:
    """A file that a method leaves in a run's folder, as a glob pattern; it goes when the folder is
    cleared.
    """

    pattern: str
    says: str = ""
