"""The judge's side of a program's objects: stand-ins whose operations happen in the program's process.

What comes back is a value of an exact built-in type, and from then on the judge's own. An object of the
program's own class stays there, and may decide only between objects of the program: against a value of the
judge it is compared by the built-in value inside it, or is unequal.
"""

from __future__ import annotations

import builtins
import operator
import sys
import types
from collections.abc import Iterator
from typing import Any

from . import wire

BASES = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, tuple, frozenset, list, dict, set, bytearray)
}
NUMBERS = ("int", "float", "complex", "bool")
COMPARING = ("eq", "ne", "lt", "le", "gt", "ge")
ARITHMETIC = "add sub mul truediv floordiv mod matmul lshift rshift and_ or_ xor pow divmod".split()
IN_PLACE = "iadd isub imul itruediv ifloordiv imod imatmul iand ior ixor ilshift irshift".split()
UNARY = ("neg", "pos", "invert", "abs")


class Unfinished(BaseException):
    """The program's process ended or broke the protocol: no check after this one can pass."""


class Line:
    """The judge's end of the pipes: asks the program's process, and answers its calls of test functions."""

    def __init__(self, questions: int, answers: int):
        self.questions, self.answers = questions, answers
        self.proxies: dict[int, Proxy] = {}
        self.errors: dict[int, type] = {}
        self.functions: dict[int, Any] = {}
        self.streams = sys.stdout, sys.stdin, builtins.input
        self.broken = False  # nothing more can be asked

    def ask(self, name: str, *arguments: Any) -> Any:
        """The value of an operation in the program's process; raises what it raised there."""
        if self.broken:
            raise Unfinished("the program's process ended")
        encoder = wire.Encoder(self.encode_foreign)
        try:
            request = [name, encoder.encode(list(arguments)), self.settings()]
        except Marked as mark:
            raise mark.error from None
        self.broken = True  # until the answer is here
        try:
            wire.send(self.questions, request)
            reply = wire.receive(self.answers)
            while reply[0] == "callback":
                self.call_back(reply)
                reply = wire.receive(self.answers)
            outcome, message, changed, printed, used = reply
        except (EOFError, OSError, TypeError, LookupError, ValueError, wire.WireError) as error:
            raise Unfinished(f"the program's process ended: {type(error).__name__}") from None
        self.broken = False
        try:
            result = self.take(outcome, message, encoder.objects, changed)
            self.pass_on(printed, used)
        except (TypeError, LookupError, ValueError, AttributeError) as error:
            raise wire.WireError(f"a value that cannot be read: {error}") from None
        if outcome == "raise":
            raise result
        return result

    def settings(self) -> dict:
        """Where the checks have put something in place of Python's output and input, the program gets it."""
        settings: dict[str, Any] = {}
        output, input_stream, input_function = self.streams
        if sys.stdout is not output:
            settings["output"] = True
        if sys.stdin is not input_stream and hasattr(sys.stdin, "getvalue"):
            settings["input"] = sys.stdin.getvalue()[sys.stdin.tell() :]
        if builtins.input is not input_function:
            settings["ask"] = self.encode_foreign(builtins.input)
        return settings

    def take(self, outcome: str, message: Any, objects: dict[int, Any], changed: list) -> Any:
        """The value or exception of a reply, after the arguments that it changed."""
        decoder = wire.Decoder(self.decode_foreign, objects)
        if outcome == "raise":
            result = self.error(message, decoder)
        else:
            result = decoder.decode(message)
        for number, contents in changed:
            decoder.fill(objects[number], contents)
        return result

    def pass_on(self, printed: str, used: int) -> None:
        """What the program printed and read goes where the checks' own would."""
        if printed and sys.stdout is not self.streams[0]:
            sys.stdout.write(str(printed))
        if used and sys.stdin is not self.streams[1]:
            sys.stdin.seek(sys.stdin.tell() + int(used))

    def call_back(self, message: list) -> None:
        """The program calls a function of the checks."""
        _, number, what, arguments, named = message
        decoder = wire.Decoder(self.decode_foreign)
        function = self.functions[number]
        try:
            if what == "next":
                value = next(function)
            else:
                value = function(*decoder.decode(arguments), **decoder.decode(named))
            reply = ["value", wire.Encoder(self.encode_foreign).encode(value)]
        except Exception as error:
            plain = [argument for argument in error.args if isinstance(argument, (str, int))]
            reply = ["raise", [type(error).__name__, wire.Encoder(self.encode_foreign).encode(plain)]]
        wire.send(self.questions, reply)

    # ------------------------------------------------------------------------------------------------ objects

    def encode_foreign(self, value: Any) -> list:
        """What is no plain value: the program's own object again, a type by name, a function to be called."""
        kind = type(value)
        if issubclass(kind, Proxy):
            return ["h", number_of(value)]
        if isinstance(value, type):
            if "__luthier_handle__" in vars(value):
                return ["h", value.__luthier_handle__]
            if shared := wire.shared_type(value):
                return shared
        if isinstance(value, BaseException) and hasattr(value, "__luthier_object__"):
            return ["h", value.__luthier_object__]
        if kind in (types.BuiltinFunctionType, types.FunctionType):
            module, name = value.__module__, value.__qualname__
            if module in sys.stdlib_module_names and getattr(sys.modules.get(module), name, None) is value:
                return ["g", module, name]
        if callable(value) or isinstance(value, Iterator):
            self.functions[len(self.functions)] = value
            return ["K", len(self.functions) - 1]
        if isinstance(value, types.ModuleType):
            return ["g", value.__name__, "__name__"]
        if isinstance(value, (dict, list, set, tuple, str, int, float)):  # an odd class of the checks' own
            bases: tuple[Any, ...] = (dict, list, set, tuple, str, float, int)
            for base in bases:
                if isinstance(value, base):
                    return wire.Encoder(self.encode_foreign, start=1 << 40).encode(base(value))
        raise Marked(TypeError(f"an object of type {kind.__name__} cannot be given to the program"))

    def decode_foreign(self, message: list) -> Any:
        """A stand-in for an object of the program, or this side's own type of a name."""
        if message[0] == "h":
            return self.proxy(int(message[1]), dict(message[2]))
        if message[0] == "g":
            return wire.own_type(str(message[1]), str(message[2]))
        if message[0] == "E":
            return self.error_type(message)
        raise wire.WireError("a value that cannot be read")

    def proxy(self, number: int, facts: dict) -> Any:
        """The one stand-in of an object."""
        if facts.get("base") == "coroutine":
            return self.coroutine(number)
        if number not in self.proxies:
            kind = CallableProxy if facts.get("call") else Proxy
            self.proxies[number] = kind(self, number, facts)
        return self.proxies[number]

    async def coroutine(self, number: int) -> Any:
        """A coroutine of the program runs in its process, when it is awaited here."""
        return self.ask("await", Proxy(self, number, {}))

    def error_type(self, message: list) -> type:
        """A type of exception that the program defined, with this side's own types below it."""
        _, number, name, bases = message
        if number not in self.errors:
            kinds = [self.decode_foreign(base) for base in bases]
            if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
                kinds = [Exception]
            members = {
                "__luthier_handle__": number,
                "__getattr__": self.error_attribute,
                "__str__": error_text,
            }
            try:
                self.errors[number] = type(str(name), tuple(kinds), members)
            except TypeError:
                self.errors[number] = type(str(name), (Exception,), members)
        return self.errors[number]

    def error_attribute(self, name: str) -> Any:
        """Replaced for each exception; a type has no attributes of the program's."""
        raise AttributeError(name)

    def error(self, message: list, decoder: wire.Decoder) -> BaseException:
        """The exception that the program raised."""
        kind = self.decode_foreign(message[0]) if message[0][0] in ("g", "E") else Exception
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            kind = Exception
        arguments = [decoder.decode(argument) for argument in message[1]]
        if "__luthier_handle__" in vars(kind):
            error = kind.__new__(kind)
            error.args = tuple(arguments)
            error.__luthier_object__ = int(message[3])
            error.__luthier_text__ = str(message[2])
            fetch_attributes(self, error)
            return error
        try:
            return kind(*arguments)
        except Exception:  # its own __init__ takes something else
            error = BaseException.__new__(kind, *arguments)
            error.args = tuple(arguments)
            return error


class Marked(Exception):
    """An exception that belongs into the check, on its way out of encoding."""

    def __init__(self, error: BaseException):
        super().__init__()
        self.error = error


def error_text(error: BaseException) -> str:
    """What the program's exception says of itself."""
    text = error.__dict__.get("__luthier_text__")
    return BaseException.__str__(error) if text is None else text


def fetch_attributes(line: Line, error: BaseException) -> None:
    """The fields of an exception of the program's own class."""
    try:
        names = line.ask("get", Proxy(line, error.__luthier_object__, {}), "__dict__")
    except Exception:
        return
    if isinstance(names, dict):
        for name, value in names.items():
            if isinstance(name, str) and not name.startswith("__"):
                error.__dict__[name] = value


# -------------------------------------------------------------------------------------------------- stand-ins


class Proxy:
    """A stand-in. It keeps its own facts out of the way of the program's names."""

    __slots__ = ("_luthier",)

    def __init__(self, line: Line, number: int, facts: dict):
        object.__setattr__(self, "_luthier", [line, number, facts, False])

    @property
    def __class__(self):
        base = BASES.get(facts_of(self).get("base", ""))
        return base or type_of(self)

    def __getattr__(self, name: str) -> Any:
        if name == "_luthier":
            raise AttributeError(name)
        mark_used(self)
        return ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        mark_used(self)
        ask(self, "set", name, value)

    def __delattr__(self, name: str) -> None:
        ask(self, "delete", name)

    def __str__(self) -> str:
        return exact(ask(self, "str"), str)

    def __repr__(self) -> str:
        return exact(ask(self, "repr"), str)

    def __format__(self, form: str) -> str:
        return exact(ask(self, "format", form), str)

    def __bool__(self) -> bool:
        return exact(ask(self, "bool"), bool)

    def __int__(self) -> int:
        return exact(ask(self, "int"), int)

    def __float__(self) -> float:
        return exact(ask(self, "float"), float)

    def __complex__(self) -> complex:
        return exact(ask(self, "complex"), complex)

    def __index__(self) -> int:
        return exact(ask(self, "index"), int)

    def __hash__(self) -> int:
        base = facts_of(self).get("base")
        return hash(inside(self)) if base else exact(ask(self, "hash"), int)

    def __len__(self) -> int:
        return exact(ask(self, "len"), int)

    def __iter__(self) -> Any:
        return ask(self, "iter")

    def __reversed__(self) -> Any:
        return ask(self, "reversed")

    def __next__(self) -> Any:
        return ask(self, "next")

    def __getitem__(self, key: Any) -> Any:
        return ask(self, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        mark_used(self)
        ask(self, "setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        ask(self, "delitem", key)

    def __dir__(self) -> list[str]:
        return ask(self, "dir")

    def __enter__(self) -> Any:
        return ask(self, "enter")

    def __exit__(self, *error: Any) -> None:
        ask(self, "exit")

    def __round__(self, digits: Any = None) -> Any:
        value = ask(self, "round") if digits is None else ask(self, "round", digits)
        return value

    def __instancecheck__(self, value: Any) -> bool:
        return exact(line_of(self).ask("isinstance", value, self), bool)

    def __subclasscheck__(self, kind: Any) -> bool:
        return exact(line_of(self).ask("issubclass", kind, self), bool)

    def __contains__(self, item: Any) -> bool:
        """Where the item is the judge's, it looks through the values itself; a class that the checks use as
        such, and that cannot be gone through, is asked.
        """
        if isinstance(item, Proxy) and not facts_of(item).get("base"):
            return exact(ask(self, "contains", item), bool)
        if facts_of(self).get("base"):
            return item in inside(self)
        if used(self):
            return exact(ask(self, "contains", item), bool)
        for place, other in enumerate(self):
            if other is item or other == item:
                return True
            if place > 1_000_000:
                break
        return False


class CallableProxy(Proxy):
    """A stand-in for a function or class of the program."""

    __slots__ = ()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        result = ask(self, "call", list(arguments), named)
        if facts_of(self).get("class") and issubclass(type(result), Proxy):
            facts_of(result)["constructed"] = True
        return result


def line_of(proxy: Proxy) -> Line:
    return object.__getattribute__(proxy, "_luthier")[0]


def number_of(proxy: Proxy) -> int:
    return object.__getattribute__(proxy, "_luthier")[1]


def facts_of(proxy: Proxy) -> dict:
    return object.__getattribute__(proxy, "_luthier")[2]


def mark_used(proxy: Proxy) -> None:
    """The checks use a name of the object: they mean an object of the program's class."""
    object.__getattribute__(proxy, "_luthier")[3] = True


def used(proxy: Proxy) -> bool:
    """Did the checks make this object by a class, and use its names?"""
    return object.__getattribute__(proxy, "_luthier")[3] and facts_of(proxy).get("constructed", False)


def ask(proxy: Proxy, name: str, *arguments: Any) -> Any:
    """An operation on a stand-in's object."""
    return line_of(proxy).ask(name, proxy, *arguments)


def type_of(value: Any) -> Any:
    """`type(value)` in a check."""
    return ask(value, "type") if issubclass(type(value), Proxy) else type(value)


def exact(value: Any, kind: type) -> Any:
    """A value that has to be of a built-in type."""
    if type(value) is not kind:
        raise TypeError(f"the program gave no {kind.__name__}")
    return value


def inside(proxy: Proxy) -> Any:
    """The built-in value in an object whose class is made from a built-in one."""
    base = BASES[facts_of(proxy)["base"]]
    value = ask(proxy, "plain")
    return exact(value, base)


def is_proxy(value: Any) -> bool:
    return issubclass(type(value), Proxy)


def compares(name: str):
    """A comparison: the program decides between its own objects, the judge all others."""
    function = getattr(operator, name)

    def compare(self: Proxy, other: Any) -> Any:
        mine, theirs = facts_of(self).get("base"), is_proxy(other) and facts_of(other).get("base")
        if is_proxy(other) and not (mine and theirs):
            return exact(ask(self, name, other), bool)
        if mine:
            return function(inside(self), inside(other) if is_proxy(other) else other)
        if name in ("eq", "ne"):
            return name == "ne"
        raise TypeError(f"'{name}' between an object of the program and {type(other).__name__}")

    return compare


def computes(name: str, reflected: bool):
    """Arithmetic: with a value of the judge's, a number stays a number, and an object an object. The program
    may not turn what the judge expects into a value that the judge compares.
    """
    function = divmod if name == "divmod" else getattr(operator, name)

    def compute(self: Proxy, other: Any) -> Any:
        if is_proxy(other):
            return line_of(self).ask(name, *((other, self) if reflected else (self, other)))
        if facts_of(self).get("base") in NUMBERS:
            mine = inside(self)
            return function(other, mine) if reflected else function(mine, other)
        if not facts_of(self).get("constructed"):
            raise TypeError(f"'{name}' between an object of the program and {type(other).__name__}")
        result = line_of(self).ask(name, *((other, self) if reflected else (self, other)))
        if is_proxy(result):
            facts_of(result)["constructed"] = True
        elif not used(self):
            raise TypeError(f"'{name}' between an object of the program and {type(other).__name__}")
        return result

    return compute


def changes(name: str):
    """In-place arithmetic gives an object of the program."""

    def change(self: Proxy, other: Any) -> Any:
        result = ask(self, name, other)
        if not is_proxy(result) and not is_proxy(other):
            return computes(name.removeprefix("i"), False)(self, other)
        return result

    return change


def single(name: str):
    """Arithmetic of one object."""

    def compute(self: Proxy) -> Any:
        return ask(self, name)

    return compute


Proxy.__doc__ = CallableProxy.__doc__ = property(lambda self: ask(self, "get", "__doc__"))  # type: ignore
for _name in COMPARING:
    setattr(Proxy, f"__{_name}__", compares(_name))
for _name in ARITHMETIC:
    _word = _name.strip("_")
    setattr(Proxy, f"__{_word}__", computes(_name, False))
    setattr(Proxy, f"__r{_word}__", computes(_name, True))
for _name in IN_PLACE:
    setattr(Proxy, f"__{_name}__", changes(_name))
for _name in UNARY:
    setattr(Proxy, f"__{_name}__", single(_name))
