"""The decorator that every method file carries: it makes a class a method with frozen, checked settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ConfigDict
from typing_extensions import dataclass_transform

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Range:
    """Where a setting is worth searching: `r: Annotated[int, Range(4, 64, log=True)] = 8`."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, init=False)
class Choices:
    """Values worth searching, ascending: `width: Annotated[int, Choices(0, 1, 2, 4)] = 4`."""

    values: tuple[float, ...]

    def __init__(self, *values: float):
        object.__setattr__(self, "values", values)


@dataclass(frozen=True)
class Internal:
    """Marks a setting that luthier fills in itself, `counts: Annotated[Counts, INTERNAL] = None`: it is saved
    with the others, and no page for people shows it.
    """


INTERNAL = Internal()


@dataclass_transform(frozen_default=True, kw_only_default=True)
def family(cls: T) -> T:
    """Settings and code that several method files share."""
    return dataclass(frozen=True, kw_only=True)(cls)


@dataclass(frozen=True)
class Coverage:
    """What a method has of a paper."""

    covers: str = ""  # what of the paper is there
    omits: str = ""  # what is not, and why
    tests: tuple[str, ...] = ()  # tests that show it, as pytest names them below tests/


def coverage_of(
    rows: Iterable[str],
    covers: str | Mapping[str, str] = "",
    omits: str | Mapping[str, str] = "",
    tests: str | Iterable[str] | Mapping[str, str | Iterable[str]] = (),
) -> dict[str, Coverage]:
    """Row -> what a declaration says of it: one value for all of its rows, or a mapping by row."""
    out = {}
    for row in rows:
        there = covers.get(row, "") if isinstance(covers, Mapping) else covers
        absent = omits.get(row, "") if isinstance(omits, Mapping) else omits
        evidence = tests.get(row, "") if isinstance(tests, Mapping) else tests
        if isinstance(evidence, str):
            evidence = evidence.split()
        coverage = Coverage(there, absent, tuple(evidence))
        if coverage != Coverage():
            out[row] = coverage
    return out


def words(value: str | Iterable[str]) -> frozenset[str]:
    """Capabilities and columns: objects, or names in one string with spaces between them."""
    return frozenset(value.split() if type(value) is str else value)


def declare(kind: str):
    """The decorator of method files of a kind.

    Its return type is inferred, so that type checkers see what it makes of a class.
    """

    @dataclass_transform(frozen_default=True, kw_only_default=True)
    def method(
        *,
        paper: str | None = None,
        row: str = "",
        use_when: str = "",
        costs: str = "",
        starting_rate: str = "",
        default_rate: float | None = None,
        rate_factor: float = 1.0,
        requires: str | Iterable[str] = (),
        provides: str | Iterable[str] = (),
        removes: str | Iterable[str] = (),
        metrics: Iterable[Any] = (),
        artifacts: Iterable[Any] = (),
        example: Mapping[str, Any] | None = None,
        former: str = "",
        former_settings: Mapping[str, str] | None = None,
        contract: dict[str, str] | None = None,
        covers: str | Mapping[str, str] = "",
        omits: str | Mapping[str, str] = "",
        tests: str | Iterable[str] | Mapping[str, str | Iterable[str]] = (),
    ) -> Callable[[T], T]:
        """Make a class a method.

        paper: where it comes from. row: its short names in the catalogue of papers. use_when: how its page
        goes on after "Use it when". costs: memory and time beside the plainest method of its kind.
        starting_rate: a learning rate to start with, and whose it is; for these two a family may have a
        `ClassVar` of the same name instead, which holds for all of its methods. default_rate: of a tuner, the
        learning rate of a recipe that names none; rate_factor: of an objective, optimizer or transform, what
        that rate is multiplied by (recipe/defaults.py). requires, provides,
        removes: capabilities and columns (registry/words.py). metrics, artifacts: what an evaluator measures,
        which files it leaves. example: small settings with which tests build it, where the defaults do not
        suit a tiny model. former, former_settings: what it and its settings were once called; these names go
        on working, with a warning. contract: contract tests that do not hold for it, each with the reason;
        `accumulation` and `processes` are also told to users: results depend on the size of micro-batches, or
        on the number of processes.
        covers, omits, tests: what of the papers in `row` is there, what is not, and the tests that show it
        ("methods/tuners/adapters/test_ssf.py::test_name", below tests/); a mapping where its rows differ.
        """

        def wrap(cls: T) -> T:
            cls = family(cls)
            cls.kind = kind
            cls.name = cls.__module__.rsplit(".", 1)[-1]
            cls.paper = paper
            cls.rows = tuple(row.split())
            cls.coverage = coverage_of(cls.rows, covers, omits, tests)
            cls.use_when = use_when
            cls.costs = costs or getattr(cls, "costs", "")
            cls.starting_rate = starting_rate or getattr(cls, "starting_rate", "")
            cls.default_rate = default_rate
            cls.rate_factor = rate_factor
            cls.requires = words(requires)
            cls.provides = words(provides)
            cls.removes = words(removes)
            cls.metrics = tuple(metrics)
            cls.artifacts = tuple(artifacts)
            cls.example = dict(example or {})
            cls.former = tuple(former.split())
            cls.former_settings = dict(former_settings or {})
            cls.contract = contract or {}
            cls.__pydantic_config__ = ConfigDict(
                extra="forbid", validate_default=True, arbitrary_types_allowed=True
            )
            return cls

        return wrap

    return method


tuner = declare("tuner")
quantizer = declare("quantizer")
objective = declare("objective")
estimator = declare("estimator")
transform = declare("transform")
optimizer = declare("optimizer")
stage = declare("stage")
reward = declare("reward")
environment = declare("environment")
role = declare("role")
plan = declare("plan")
compiler = declare("compiler")
merger = declare("merger")
decoder = declare("decoder")
evaluator = declare("evaluator")
architecture = declare("architecture")
row_format = declare("format")
searcher = declare("searcher")
exporter = declare("exporter")
