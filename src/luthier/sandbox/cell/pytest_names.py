"""The names of pytest that checks of functions use, for the judge, in whose place pytest is not installed."""

from __future__ import annotations

import re
from typing import Any


class raises:  # noqa: N801
    """`with raises(ValueError, match="..."):`, or `raises(ValueError, function, arguments)`."""

    def __new__(cls, kinds: Any, *call: Any, **named: Any):
        self = super().__new__(cls)
        self.kinds, self.match, self.value = kinds, named.pop("match", None), None
        if not call:
            return self
        with self:
            call[0](*call[1:], **named)
        return self

    def __enter__(self) -> raises:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if kind is None:
            raise AssertionError("no exception was raised")
        if not issubclass(kind, self.kinds):
            return False
        self.value, self.type = error, kind
        if self.match is not None and not re.search(self.match, str(error)):
            raise AssertionError("the exception has another text")
        return True


class approx:  # noqa: N801
    """A number, or numbers in a list, tuple or dict, compared with a tolerance."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None):
        self.expected, self.relative, self.absolute = expected, rel, abs

    def __eq__(self, other: Any) -> bool:
        return self.near(self.expected, other)

    def near(self, expected: Any, value: Any) -> bool:
        """Is every number of the value near what is expected?"""
        if isinstance(expected, dict):
            if not isinstance(value, dict) or expected.keys() != value.keys():
                return False
            return all(self.near(expected[key], value[key]) for key in expected)
        if isinstance(expected, (list, tuple)):
            if not isinstance(value, (list, tuple)) or len(expected) != len(value):
                return False
            return all(self.near(*pair) for pair in zip(expected, value, strict=True))
        if not isinstance(expected, (int, float, complex)) or not isinstance(value, (int, float, complex)):
            return bool(expected == value)
        if expected == value:
            return True
        relative = 1e-6 if self.relative is None else self.relative
        absolute = 1e-12 if self.absolute is None else self.absolute
        if self.absolute is not None and self.relative is None:
            relative = 0.0
        return abs(expected - value) <= max(relative * abs(expected), absolute)

    __hash__ = None  # type: ignore[assignment]


def fail(reason: str = "") -> None:
    """Fail a check."""
    raise AssertionError(reason)


class Mark:
    """`@pytest.mark.anything` leaves a test as it is."""

    def __getattr__(self, name: str) -> Any:
        def mark(*arguments: Any, **named: Any) -> Any:
            if len(arguments) == 1 and callable(arguments[0]):
                return arguments[0]
            return lambda test: test

        return mark


mark = Mark()
