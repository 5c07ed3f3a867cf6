"""Limits on what rendering a chat template takes: it comes with a model that somebody made, and is a program.

The sandbox of jinja keeps a template from reaching anything, but not from running on: two loops, a product or
a text that doubles itself take all time and memory there is. So a template is compiled with a count around
whatever may take long or grow: turns of loops, calls, filters, operators, literals, what it writes. The count
is of characters and steps, the same on every machine; time is only the last resort.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from types import GeneratorType
from typing import Any

from jinja2 import Template, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from luthier.compat.transformers import compile_templates_with

MAX_WORK = 16_000_000  # characters that a rendering may write or copy on the way
MAX_WRITTEN = 1_000_000  # characters of the text, which is then split into tokens
# how often over it may write, and copy on the way, what the turns say
TIMES_WRITTEN, TIMES_COPIED = 4, 16
TURN = 200  # a turn, beside what it says, in characters
STEP = 100  # a turn of a loop or a call, in characters
ELEMENT = 20  # an element of a list, in characters
READ = 8  # characters that are compared or searched, for one that is written
MAX_SECONDS = 1.0  # of the thread's own time, and a row is rendered several times
# before it counts: reading the thread's own time may take longer than rendering, so that only long ones pay
UNTIMED_SECONDS = 0.1
SMALL_WORK = 200_000  # characters: what has done less may have waited for a collection of garbage,
SMALL_WORK_SECONDS = 5.0  # and has so long
MAX_TEMPLATE = 200_000  # characters of a template
MAX_NUMBER = 1_000_000  # as an argument of a filter or a method, such as a width
MAX_BITS = 10_000  # of a whole number
MAX_SMALL = 100_000  # characters for filters that take more than linear time
SLOW_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
REFUSED_METHODS = ("from_bytes", "maketrans", "translate")  # no template needs them, and they multiply
WIDTH = re.compile(r"\d{5,}|%[^a-zA-Z%]*\*")  # in a format: wide, or as wide as an argument says
NESTED_WIDTH = re.compile(r"\{[^{}]*\{")
VIEWS = (type({}.keys()), type({}.values()), type({}.items()))


class TemplateLimit(Exception):
    """A template was stopped. The message says at which limit."""


class Budget:
    """What one rendering may still take. characters: of what the turns say."""

    def __init__(self, characters: int) -> None:
        self.all = MAX_WORK + TIMES_COPIED * characters
        self.left = self.all
        self.longest = MAX_WRITTEN + TIMES_WRITTEN * characters
        self.cpu_start: float | None = None
        self.deadline = time.perf_counter() + UNTIMED_SECONDS
        # id -> (characters as text, levels) of lists and mappings; `alive` keeps the numbers theirs
        self.sizes: dict[int, tuple[int, int]] = {}
        self.alive: list[Any] = []

    def spend(self, characters: int) -> None:
        """Raises TemplateLimit where there is no more."""
        self.left -= characters
        if self.left < 0:
            raise TemplateLimit(f"more than {MAX_WORK:,} characters or steps")

    def check(self, characters: int) -> None:
        """Whether so much may come at once."""
        if characters > self.left:
            raise TemplateLimit(f"more than {MAX_WORK:,} characters or steps")

    def step(self) -> None:
        """A turn of a loop, a call, a filter. The thread's own time is read only where much has passed: the
        machine may have slept meanwhile.
        """
        self.spend(STEP)
        if time.perf_counter() <= self.deadline:
            return
        if self.cpu_start is None:
            self.cpu_start = time.thread_time()
            self.deadline = time.perf_counter() + MAX_SECONDS
        else:
            limit = MAX_SECONDS
            if self.all - self.left < SMALL_WORK:
                limit = SMALL_WORK_SECONDS
            if time.thread_time() - self.cpu_start > limit:
                raise TemplateLimit(f"more than {limit:.0f} s of computing")

    def size(self, value: Any) -> tuple[int, int]:
        """(about how many characters a value takes as text, how many levels it has)."""
        if isinstance(value, (str, bytes)):
            return len(value), 0
        if not isinstance(value, (list, tuple, dict, *VIEWS)):
            return 8, 0
        size = self.sizes.get(id(value))
        if size is not None:
            return size
        characters, levels = 8, 0
        for inner in _items(value):
            inner_characters, inner_levels = self.size(inner)
            characters += 4 + inner_characters
            levels = max(levels, inner_levels)
            self.check(characters)
        self.spend(ELEMENT * len(value))
        self.sizes[id(value)] = characters, levels + 1
        self.alive.append(value)
        return characters, levels + 1

    def count(self, value: Any) -> Any:
        """A value that was made: counted, and bounded where it grows without being read."""
        if isinstance(value, (str, bytes)):
            self.spend(len(value))
        elif isinstance(value, (list, tuple, dict, *VIEWS)):
            self.size(value)
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise TemplateLimit(f"a number of more than {MAX_BITS:,} bits")
        elif isinstance(value, GeneratorType):
            return count_turns(value)
        return value


_budget: ContextVar[Budget | None] = ContextVar("template_budget", default=None)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value


@contextmanager
def limited(turns: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """While within, chat templates of this thread are compiled and rendered within the limits, which are the
    wider the more the turns say. Raises TemplateLimit.
    """
    characters = TURN * len(turns)
    for turn in turns:
        content = turn.get("content")
        if isinstance(content, str):
            characters += len(content)
    token = _budget.set(Budget(characters))
    try:
        with compile_templates_with(_compile):
            yield
    finally:
        _budget.reset(token)


def _compile(original: Callable[[str], Template], template: str) -> Template:
    """A template compiled as transformers would, with the counts in it."""
    if _budget.get() is None:  # of another thread, which renders something else meanwhile
        return original(template)
    if not isinstance(template, str):
        raise TypeError(f"it is a {type(template).__name__}, not a text")
    if len(template) > MAX_TEMPLATE:
        raise TemplateLimit(f"a template of more than {MAX_TEMPLATE:,} characters")
    return _compile_counted(original, template)


@lru_cache(maxsize=32)
def _compile_counted(original: Callable[[str], Template], template: str) -> Template:
    without_cache = getattr(original, "__wrapped__", original)
    environment: Any = without_cache("").environment  # with transformers' own filters and globals
    environment.__class__ = CountingEnvironment
    for name, function in list(environment.filters.items()):
        environment.filters[name] = counting_filter(name, function)
    environment.filters |= {TURNS: count_turns, NEW_VALUE: count_value, READ_VALUE: count_read}
    environment.globals.pop("lipsum", None)
    environment.globals["namespace"] = silent(environment.globals["namespace"])
    compiled: Any = environment.from_string(template)
    compiled.root_render_func = counting_output(compiled.root_render_func)
    return compiled


# ----------------------------------------------------------------------------------------- what is counted

# names that no template can write
TURNS, NEW_VALUE, READ_VALUE = "counted turns", "value that was made", "value that is read"


def count_turns(values: Iterable[Any]) -> Iterator[Any]:
    """The values of a loop, each a step."""
    budget = _budget.get()
    for value in values:
        if budget is not None:
            budget.step()
        yield value


def count_value(value: Any) -> Any:
    """A value that was just made."""
    budget = _budget.get()
    if budget is not None:
        budget.step()
        return budget.count(value)
    return value


def count_read(value: Any) -> Any:
    """A value that is compared with another, or searched."""
    budget = _budget.get()
    if budget is not None:
        budget.step()
        budget.spend(budget.size(value)[0] // READ)
    return value


def counting_output(render: Callable[[Any], Iterator[str]]) -> Callable[[Any], Iterator[str]]:
    """What a template writes, counted as it is written."""

    def counted(context: Any) -> Iterator[str]:
        budget, written = _budget.get(), 0
        for piece in render(context):
            written += len(piece)
            if budget is not None:
                budget.spend(len(piece))
                if written > budget.longest:
                    raise TemplateLimit(f"more than {budget.longest:,} characters of text")
            yield piece

    return counted


def silent(namespace: type) -> type:
    """Namespaces that do not write their values: one may hold another twice."""

    class Namespace(namespace):
        def __repr__(self) -> str:
            return "<Namespace>"

    return Namespace


class Counted(NodeTransformer):
    """Puts the counts into a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through(TURNS, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through(NEW_VALUE, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through(NEW_VALUE, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or _is_constant(node):
            return node
        return _through(NEW_VALUE, node)

    visit_List = visit_Tuple = visit_Dict = visit_literal

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        for operand in node.ops:
            if not _is_constant(operand.expr):
                operand.expr = _through(READ_VALUE, operand.expr)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.args or node.dyn_args:
            node.node = _through(READ_VALUE, node.node)
        return node


def _through(name: str, node: Any) -> nodes.Expr:
    """An expression whose value goes through one of the counts."""
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


def _is_constant(node: nodes.Node) -> bool:
    """Whether an expression is written out in the template, and so as small as it."""
    if isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair)):
        return all(map(_is_constant, node.iter_child_nodes()))
    return isinstance(node, nodes.Const)


# ------------------------------------------------------------------------------------------- the environment


class CountingEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, with the counts."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(Counted().visit(source), *args, **kwargs)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """The text of a macro, a block or the whole."""
        budget = _budget.get()
        if budget is None:
            return "".join(parts)
        if isinstance(parts, GeneratorType):  # the whole, which is counted piece by piece
            return "".join(list(parts))
        pieces = list(parts)
        budget.spend(sum(map(len, pieces)))
        return "".join(pieces)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in REFUSED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if budget is None:
            return super().call_binop(context, operator, left, right)
        if operator == "+":
            value = left + right
            if type(value) is str:
                budget.spend(len(value))
                return value
            return budget.count(value)
        if operator == "%" and isinstance(left, str):
            _check_format(budget, left, "%", right if isinstance(right, tuple) else (right,))
        elif operator == "*":
            _check_product(budget, left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(right, 1) > MAX_BITS:
                raise TemplateLimit(f"a number of more than {MAX_BITS:,} bits")
        budget.step()
        return budget.count(self.binop_table[operator](left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        if budget is None:
            return super().call(__context, __obj, *args, **kwargs)
        budget.step()
        for value in args:
            if type(value) is not str:
                budget.count(value)
        for value in kwargs.values():
            if type(value) is not str:
                budget.count(value)
        method = getattr(__obj, "__wrapped__", __obj)  # `format` is wrapped by the sandbox
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            args = tuple(_check_call(budget, method.__name__, owner, args, kwargs))
        return budget.count(super().call(__context, __obj, *args, **kwargs))


def counting_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments are bounded, and whose value is counted."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        if budget is None:
            return function(*args, **kwargs)
        budget.step()
        before, (value, *rest) = args[:first], args[first:]
        value, *rest = _check_call(budget, name, value, (value, *rest), kwargs, is_filter=True)
        return budget.count(function(*before, value, *rest, **kwargs))

    return counted


# ------------------------------------------------------------------------------------ what grows all at once


def _check_call(
    budget: Budget,
    name: str,
    owner: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_filter: bool = False,
) -> Sequence[Any]:
    """Bound a method of a text or a number, or a filter, by what it would make of its arguments; these, where
    they had to be read.

    args: of a filter the value comes first.
    """
    options = [*(args[1:] if is_filter else args), *kwargs.values()]
    for option in options:
        if isinstance(option, int) and abs(option) > MAX_NUMBER:
            raise TemplateLimit(f"{name} with a number above {MAX_NUMBER:,}")
    if not isinstance(owner, (str, bytes)) and not is_filter:
        return args
    if name == "join":
        return _read_joined(budget, owner, args, kwargs, is_filter)
    lengths = [len(option) for option in options if isinstance(option, (str, bytes))]
    numbers = [option for option in options if isinstance(option, int)]
    if name == "replace":
        budget.check((len(str(owner)) + 1) * max([1, *lengths]))
    elif name in ("format", "format_map"):
        _check_format(budget, str(owner), "%" if is_filter else "{", options)
    elif name == "expandtabs":
        budget.check(len(owner) * max([8, *numbers]))
    elif name == "indent":
        budget.check((str(owner).count("\n") + 1) * max([4, *numbers, *lengths]))
    elif name == "tojson":
        characters, levels = budget.size(owner)
        widths = [len(str(part)) for option in options for part in (option if type(option) is tuple else ())]
        budget.check(characters * (1 + (levels + 1) * max([0, *numbers, *lengths]) + sum(widths)))
    elif name == "sum" and not all(isinstance(option, (int, float, str)) for option in options):
        raise TemplateLimit("sum of other values than numbers")
    elif name in SLOW_FILTERS and max([budget.size(owner)[0], *lengths]) > MAX_SMALL:
        raise TemplateLimit(f"{name} of more than {MAX_SMALL:,} characters")
    return args


def _read_joined(
    budget: Budget, owner: Any, args: Sequence[Any], kwargs: Mapping[str, Any], is_filter: bool
) -> Sequence[Any]:
    """The arguments of `join`, with the texts that are joined as a list."""
    if not args:
        return args
    texts, *rest = args
    if not isinstance(texts, (str, list, tuple, dict)):
        texts = list(count_turns(texts))
    separators = [owner] if not is_filter else [*rest, *kwargs.values()]
    longest = max([len(text) for text in separators if isinstance(text, (str, bytes))], default=0)
    budget.check(budget.size(texts)[0] + len(texts) * longest)
    return texts, *rest


def _check_format(budget: Budget, text: str, mark: str, values: Iterable[Any]) -> None:
    """Bound a text that is filled in."""
    if WIDTH.search(text):
        raise TemplateLimit("a format of more than 9,999 characters")
    each = MAX_NUMBER if NESTED_WIDTH.search(text) else 10_000
    for value in values:
        each += budget.size(value)[0]
    budget.check(len(text) + text.count(mark) * each)


def _check_product(budget: Budget, left: Any, right: Any) -> None:
    """Bound `*`: of a text or list as often as a number says, or of two numbers."""
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_BITS:
            raise TemplateLimit(f"a number of more than {MAX_BITS:,} bits")
        return
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(value, (str, bytes, list, tuple)):
            budget.check(budget.size(value)[0] * max(times, 0))
