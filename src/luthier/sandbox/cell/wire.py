"""How values go from one process to the other: exact built-in types by value, everything else by a number.

A message is JSON behind its length. A value that JSON has is itself; any other is a list that begins with a
tag. Lists, dicts and other containers that may change are numbered where they first appear, so that the same
object twice (or a list in itself) stays the same object. Nothing that is decoded runs code: types come from
the tables below.
"""

from __future__ import annotations

import os
import sys
from _collections import OrderedDict, defaultdict, deque  # what `collections` has them from, in less time

TYPE_CHECKING = False  # `typing` takes longer to import than a program to run
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MESSAGE = 32 << 20  # bytes of the longest message
SMALL = 1 << 62  # a whole number below it is written as JSON
TEXTS = {  # objects that are their own text: (how they are written, how they are read)
    ("decimal", "Decimal"): ("__str__", None),
    ("fractions", "Fraction"): ("__str__", None),
    ("datetime", "date"): ("isoformat", "fromisoformat"),
    ("datetime", "datetime"): ("isoformat", "fromisoformat"),
    ("datetime", "time"): ("isoformat", "fromisoformat"),
}
SEQUENCES = {"t": tuple, "f": frozenset}
CHANGING = {"l": list, "s": set, "q": deque}
MAPPINGS = {"d": dict, "O": OrderedDict, "D": defaultdict}
CHANGING_TYPES, MAPPING_TYPES = tuple(CHANGING.values()), tuple(MAPPINGS.values())
TAGS = {kind: tag for table in (SEQUENCES, CHANGING, MAPPINGS) for tag, kind in table.items()}
CONSTANTS = {"...": Ellipsis, "NotImplemented": NotImplemented}
# types a program may hand out by name; the other side has its own of the same name
SHARED_MODULES = ("builtins", "collections", "datetime", "decimal", "fractions", "enum", "typing")
SIMPLE = frozenset({type(None), bool, str, float})


def fast_json():
    """(dumps, loads) from the C half of `json` alone: its other half takes longer to import than most
    programs run.
    """
    try:
        import _json as c_json

        half: Any = c_json

        class Context:
            strict, object_hook, object_pairs_hook = True, None, None
            parse_float, parse_int, memo = float, int, {}
            parse_constant = staticmethod({"NaN": float("nan"), "Infinity": 1e999, "-Infinity": -1e999}.get)

        write = half.make_encoder(
            None, None, half.encode_basestring_ascii, None, ":", ",", False, False, True
        )
        scan = half.make_scanner(Context)
        dumps, loads = lambda value: "".join(write(value, 0)), lambda text: scan(text, 0)[0]
        if loads(dumps([1.5, "a", None, {"b": [True]}])) == [1.5, "a", None, {"b": [True]}]:
            return dumps, loads
    except Exception:  # another Python's insides
        pass
    import json

    return json.dumps, json.loads


dumps, loads = fast_json()


class WireError(Exception):
    """A message that no honest process sends."""


# --------------------------------------------------------------------------------------------------- messages


def send(descriptor: int, message: Any) -> None:
    """Write a message; a longer one than `MESSAGE` is a WireError."""
    data = dumps(message).encode()
    if len(data) > MESSAGE:
        raise WireError("a value is too large to be checked")
    data = memoryview(len(data).to_bytes(8, "little") + data)
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """Read a message; EOFError where the other side ended."""
    length = int.from_bytes(read(descriptor, 8), "little")
    if length > MESSAGE:
        raise WireError("a value is too large to be checked")
    try:
        return loads(read(descriptor, length).decode())
    except (ValueError, RecursionError, StopIteration):
        raise WireError("a message that cannot be read") from None


def read(descriptor: int, length: int) -> bytes:
    """Exactly so many bytes."""
    parts = []
    while length:
        part = os.read(descriptor, min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


# ----------------------------------------------------------------------------------------------------- values


class Encoder:
    """Values to JSON. `foreign(value)` writes what is not of an exact built-in type."""

    def __init__(self, foreign: Callable[[Any], list], numbers: dict[int, int] | None = None, start: int = 0):
        self.foreign = foreign
        self.numbers = dict(numbers or {})  # identity of a container -> its number
        self.objects: dict[int, Any] = {}  # number -> container, for what was written here first
        self.next = start

    def encode(self, value: Any) -> Any:
        """JSON for a value."""
        kind = type(value)
        if kind in SIMPLE:
            return value
        if kind is int:
            return value if -SMALL < value < SMALL else ["i", hex(value)]
        if kind in CHANGING_TYPES or kind in MAPPING_TYPES or kind is bytearray or is_counter(kind):
            if id(value) in self.numbers:
                return ["r", self.numbers[id(value)]]
            number = self.next
            self.next += 1
            self.numbers[id(value)] = number
            self.objects[number] = value
            return self.contents(value, number)
        if kind in (tuple, frozenset):
            return [TAGS[kind], [self.encode(item) for item in value]]
        if kind is bytes:
            return ["b", value.decode("latin-1")]
        if kind is complex:
            return ["c", value.real, value.imag]
        for (module, name), (write, _) in TEXTS.items():
            if kind is getattr(sys.modules.get(module), name, None):
                return ["x", module, name, getattr(kind, write)(value)]
        if kind is getattr(sys.modules.get("datetime"), "timedelta", None):
            return ["T", value.days, value.seconds, value.microseconds]
        if kind is range or kind is slice:
            return [kind.__name__, [self.encode(v) for v in (value.start, value.stop, value.step)]]
        if value is Ellipsis or value is NotImplemented:
            return ["k", "..." if value is Ellipsis else "NotImplemented"]
        return self.array(value) or self.foreign(value)

    def contents(self, value: Any, number: int) -> list:
        """A container that may change, written out."""
        kind = type(value)
        if kind is bytearray:
            return ["B", number, value.decode("latin-1")]
        if is_counter(kind) or kind in MAPPING_TYPES:
            # `list` first: what is encoded may change while it is
            pairs = [[self.encode(k), self.encode(v)] for k, v in list(dict.items(value))]
            return [TAGS.get(kind, "C"), number, pairs]
        return [TAGS[kind], number, [self.encode(item) for item in list(value)]]

    def array(self, value: Any) -> list | None:
        """An array or scalar of numpy; None for anything else."""
        numpy = sys.modules.get("numpy")
        kind = type(value)
        if numpy is None or not (kind is numpy.ndarray or issubclass(kind, numpy.generic)):
            return None
        shape = None if kind is not numpy.ndarray else list(value.shape)
        return ["n", value.dtype.str, shape, value.tobytes().decode("latin-1")]


class Decoder:
    """JSON to values. `foreign(list)` reads the tags that are not of this file."""

    def __init__(self, foreign: Callable[[list], Any], objects: dict[int, Any] | None = None):
        self.foreign = foreign
        self.objects = dict(objects or {})

    def decode(self, message: Any) -> Any:
        """The value; WireError where it is not one."""
        if not isinstance(message, list):
            if isinstance(message, dict):
                raise WireError("a message that cannot be read")
            return message
        try:
            return self.tagged(message)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError) as error:
            raise WireError(f"a value that cannot be read: {type(error).__name__}") from None

    def tagged(self, message: list) -> Any:
        """A value that is a list with a tag."""
        tag = message[0]
        if tag == "i":
            return int(message[1], 16)
        if tag == "r":
            return self.objects[message[1]]
        if tag in SEQUENCES:
            return SEQUENCES[tag]([self.decode(item) for item in message[1]])
        if tag in CHANGING or tag in MAPPINGS or tag in ("B", "C"):
            value = empty(tag)
            self.objects[message[1]] = value
            self.fill(value, message)
            return value
        if tag == "b":
            return message[1].encode("latin-1")
        if tag == "c":
            return complex(message[1], message[2])
        if tag == "x":
            return from_text(*message[1:4])
        if tag == "T":
            import datetime

            return datetime.timedelta(*message[1:4])
        if tag in ("range", "slice"):
            kind = range if tag == "range" else slice
            return kind(*(self.decode(item) for item in message[1]))
        if tag == "k":
            return CONSTANTS[message[1]]
        if tag == "n":
            return decode_array(*message[1:4])
        return self.foreign(message)

    def fill(self, value: Any, message: list) -> None:
        """Give a container the contents of a message, in place."""
        contents = message[2]
        if isinstance(value, bytearray):
            value[:] = contents.encode("latin-1")
        elif isinstance(value, dict):
            pairs = [(self.decode(k), self.decode(v)) for k, v in contents]
            value.clear()
            for key, item in pairs:
                dict.__setitem__(value, key, item)
        elif isinstance(value, set):
            items = [self.decode(item) for item in contents]
            value.clear()
            value.update(items)
        else:
            items = [self.decode(item) for item in contents]
            value.clear()
            value.extend(items)


def is_counter(kind: type) -> bool:
    """Is it `collections.Counter`, in a process that uses it?"""
    return kind is getattr(sys.modules.get("collections"), "Counter", None)


def empty(tag: str) -> Any:
    """A new container."""
    if tag == "B":
        return bytearray()
    if tag == "C":
        import collections

        return collections.Counter()
    return (CHANGING.get(tag) or MAPPINGS[tag])()


def from_text(module: str, name: str, text: str) -> Any:
    """A number or a time from its text."""
    _, read_text = TEXTS[module, name]
    kind = getattr(__import__(module), name)
    text = str(text)[:100_000]
    return kind(text) if read_text is None else getattr(kind, read_text)(text)


def decode_array(dtype: str, shape: list[int] | None, data: str) -> Any:
    """An array of numpy, or one number of it where there is no shape."""
    import re

    import numpy

    # no objects, which would be addresses
    if not re.fullmatch(r"[<>|=]?([biufcSUV]\d{1,6}|[mM]8(\[\w{1,6}\])?)", dtype):
        raise WireError("an array of another type")
    flat = numpy.frombuffer(data.encode("latin-1"), dtype=numpy.dtype(dtype))
    if shape is None:
        return flat[0]
    return flat.reshape([int(n) for n in shape]).copy()


def shared_type(kind: type) -> list | None:
    """A type of Python's own that both sides have, by name; None for any other."""
    module, name = type.__getattribute__(kind, "__module__"), type.__getattribute__(kind, "__qualname__")
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    plain = module in SHARED_MODULES or (
        issubclass(kind, BaseException) and module.partition(".")[0] in sys.stdlib_module_names
    )
    if plain and getattr(sys.modules.get(module), name, None) is kind:
        return ["g", module, name]
    return None


def own_type(module: str, name: str) -> type:
    """This side's type of that name; WireError for what is not to be shared."""
    import importlib

    top = module.partition(".")[0]
    if top not in sys.stdlib_module_names or top in ("unittest", "test", "idlelib", "lib2to3"):
        raise WireError("a type of a module that is not shared")
    # only what is loaded, or is plain: an import may run code or open windows
    loaded = sys.modules.get(module)
    if loaded is None and module in ("json.decoder", "zipfile", "queue", "asyncio.exceptions", "csv", "_csv"):
        loaded = importlib.import_module(module)
    kind = getattr(loaded, name, None)
    if not isinstance(kind, type):
        raise WireError("not a type")
    if module not in SHARED_MODULES and not issubclass(kind, BaseException):
        raise WireError("not a shared type")
    return kind
