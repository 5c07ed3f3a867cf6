"""The program's side of its checks: does with the program's objects what the judge asks; gives the values.

Runs in the program's process, among the program's code; nothing here is trusted.
"""

from __future__ import annotations

import _operator as operator  # `operator` itself takes longer to import
import builtins
import io
import sys

from . import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PROGRAM = "<program>"
BASES: tuple[Any, ...] = (bool, int, float, complex, str, bytes, tuple, frozenset, list, dict, set, bytearray)


def run_coroutine(coroutine: Any) -> Any:
    """The result of a coroutine of the program."""
    import asyncio

    async def outer():
        return await coroutine

    return asyncio.run(outer())


def plain(value: Any) -> Any:
    """The built-in value inside an object whose class is made from a built-in one."""
    for base in BASES:
        if isinstance(value, base):
            if base in (tuple, frozenset, list, set):
                return base(base.__iter__(value))
            if base is dict:
                return {key: dict.__getitem__(value, key) for key in dict.__iter__(value)}
            if base is str:
                return str.__str__(value)
            if base in (int, float):
                return base.__add__(value, 0)
            return base(value)
    raise TypeError("not made from a built-in type")


OPERATIONS = {
    "call": lambda function, arguments, named: function(*arguments, **named),
    "get": getattr,
    "set": setattr,
    "delete": delattr,
    "str": str,
    "repr": repr,
    "format": format,
    "bool": bool,
    "int": int,
    "float": float,
    "complex": complex,
    "index": operator.index,
    "hash": hash,
    "len": len,
    "iter": iter,
    "next": next,
    "reversed": reversed,
    "type": type,
    "dir": dir,
    "round": round,
    "abs": abs,
    "isinstance": isinstance,
    "issubclass": issubclass,
    "plain": plain,
    "await": run_coroutine,
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value: type(value).__exit__(value, None, None, None),
    "divmod": divmod,
    "pow": pow,
}
BINARY = ("add sub mul truediv floordiv mod matmul lshift rshift and_ or_ xor eq ne lt le gt ge contains "
          "getitem setitem delitem neg pos invert iadd isub imul itruediv ifloordiv imod imatmul iand ior "
          "ixor ilshift irshift").split()  # fmt: skip
OPERATIONS |= {name: getattr(operator, name) for name in BINARY}


class Callback:
    """A function, or an iterator, of the checks: calling it asks the judge."""

    def __init__(self, ask, number: int):
        self.__ask, self.__number = ask, number

    def __call__(self, *arguments, **named):
        return self.__ask(self.__number, "call", arguments, named)

    def __iter__(self):
        return self

    def __next__(self):
        return self.__ask(self.__number, "next", (), {})


class Answers:
    """The program's names and objects, behind two pipes."""

    def __init__(self, module: Any, questions: int, answers: int):
        self.names = vars(module)
        self.questions, self.answers = questions, answers
        self.handles: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}  # identity of an object -> its handle

    def run(self, code: str) -> bool:
        """Run the program; tell how it ended and which names it has. True where it ran to its end."""
        before = set(self.names)
        try:
            exec(compile(code, PROGRAM, "exec", dont_inherit=True), self.names)
        except SystemExit as error:
            ok = not error.code
            self.say(["exit", "" if ok else f"exit {error.code}"[:300]])
            return False
        except MemoryError:
            self.say(["failed", "memory"])
            return False
        except BaseException as error:  # KeyboardInterrupt raised by the program is its own
            self.say(["failed", sentence(error)])
            explain(error)
            return False
        kinds = {name: self.kind_of(value) for name, value in list(self.names.items()) if name not in before}
        self.say(["ran", kinds])
        return True

    def kind_of(self, value: Any) -> str:
        """What a name of the program stands for: a module, something of its own, or a value."""
        if type(value) is type(sys):
            return "module:" + str(value.__name__)
        if isinstance(value, (type, type(run_coroutine))) and value.__module__ in ("__main__", "__program__"):
            return "own"
        return "value"

    def say(self, message: list) -> None:
        wire.send(self.answers, message)

    def serve(self) -> None:
        """Answer until the judge ends."""
        while True:
            try:
                request = wire.receive(self.questions)
            except (EOFError, OSError):
                return
            self.say(self.answer(request))

    def answer(self, request: list) -> list:
        """["value", value, changed arguments, output, input left] or ["raise", exception, ...]."""
        name, message, settings = request
        decoder = wire.Decoder(self.decode_foreign)
        output = io.StringIO() if settings.get("output") else None
        text = io.StringIO(settings["input"]) if "input" in settings else None
        before = sys.stdout, sys.stdin, builtins.input
        outcome = "value"
        try:
            arguments = decoder.decode(message)
            sys.stdout, sys.stdin = output or sys.stdout, text or sys.stdin
            if "ask" in settings:
                builtins.input = decoder.decode(settings["ask"])
            result = self.operate(name, arguments)
        except BaseException as error:
            outcome, result = "raise", error
        finally:
            sys.stdout, sys.stdin, builtins.input = before
        numbers = {id(value): number for number, value in decoder.objects.items()}
        start = 1 + max(decoder.objects, default=-1)
        encoder = wire.Encoder(self.encode_foreign, numbers, start)
        try:
            encoded = self.encode_error(result, encoder) if outcome == "raise" else encoder.encode(result)
            changed = []
            for number, value in decoder.objects.items():
                if number:  # 0 is the list of arguments itself
                    changed.append([number, encoder.contents(value, number)])
        except BaseException as error:
            outcome, changed = "raise", []
            encoder = wire.Encoder(self.encode_foreign, {}, start)
            encoded = self.encode_error(ValueError(f"not a value: {type(error).__name__}"), encoder)
        printed = output.getvalue() if output else ""
        used = text.tell() if text else 0
        return [outcome, encoded, changed, printed, used]

    def operate(self, name: str, arguments: list) -> Any:
        """One operation on the program's objects."""
        if name == "name":
            if arguments[0] not in self.names:
                raise NameError(f"name {arguments[0]!r} is not defined")
            return self.names[arguments[0]]
        if name == "define":
            exec(compile(arguments[0], "<check>", "exec", dont_inherit=True), self.names)
            return None
        return OPERATIONS[name](*arguments)

    # ------------------------------------------------------------------------------------------------ objects

    def handle(self, value: Any) -> int:
        """The number under which the judge knows an object; the object stays as long as the process."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.handles)
            self.handles[len(self.handles)] = value
        return self.numbers[id(value)]

    def encode_foreign(self, value: Any) -> list:
        """An object of the program, by its number and what the judge has to know of it."""
        if isinstance(value, type):
            if shared := wire.shared_type(value):
                return shared
            if issubclass(value, BaseException):
                bases = [self.encode_foreign(base) for base in value.__bases__ if base is not object]
                return ["E", self.handle(value), value.__name__, bases]
        base = None
        for kind in BASES:
            if isinstance(value, kind):
                base = kind.__name__
                break
        if type(value).__name__ == "coroutine" and hasattr(value, "cr_code"):
            base = "coroutine"
        facts = {
            "class": isinstance(value, type),
            "call": callable(value),
            "base": base,
            "iterates": hasattr(type(value), "__iter__"),
        }
        return ["h", self.handle(value), facts]

    def encode_error(self, error: BaseException, encoder: wire.Encoder) -> list:
        """An exception: its type, arguments and text."""
        kind = self.encode_foreign(type(error))
        try:
            arguments = [encoder.encode(argument) for argument in error.args]
        except BaseException:
            arguments = []
        try:
            text = str(error)[:1000]
        except BaseException:  # a __str__ of the program's own
            text = ""
        return [kind, arguments, text, self.handle(error)]

    def decode_foreign(self, message: list) -> Any:
        """What the judge sends: an object of this process, a shared type, a function of the checks."""
        if message[0] == "h":
            return self.handles[message[1]]
        if message[0] == "g":
            __import__(message[1])
            value = sys.modules[message[1]]
            for part in message[2].split("."):
                value = getattr(value, part)
            return value
        if message[0] == "K":
            return Callback(self.ask, message[1])
        raise wire.WireError(f"unknown: {message[0]}")

    def ask(self, number: int, what: str, arguments: tuple, named: dict) -> Any:
        """Call a function of the checks while the judge waits for an answer."""
        encoder = wire.Encoder(self.encode_foreign)
        self.say(["callback", number, what, encoder.encode(list(arguments)), encoder.encode(named)])
        outcome, message = wire.receive(self.questions)
        decoder = wire.Decoder(self.decode_foreign)
        if outcome == "value":
            return decoder.decode(message)
        kind = getattr(builtins, message[0], RuntimeError)
        raise kind(*decoder.decode(message[1]))


def sentence(error: BaseException) -> str:
    """An error as a line."""
    try:
        return f"{type(error).__name__}: {str(error)[:300]}".rstrip(": ")
    except Exception:  # a __str__ of the program's own
        return type(error).__name__


def explain(error: BaseException) -> None:
    """The traceback on standard error, from the program's own frames on, unless memory is gone."""
    try:
        import traceback

        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != PROGRAM:
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames)
    except BaseException:
        pass
