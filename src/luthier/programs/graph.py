"""A workflow as a graph: nodes are values, bundles are functions whose calls are recorded.

    x = node(5.0, trainable=True, name="x")

    @bundle()
    def square(v):
        "The square of a number."
        return v * v

    y = square(x - 3)          # a node; y.data is 4.0, and ancestors(y) are the nodes that it came from

A bundle that raises gives `Failed`, which holds a node like any other, with the error's text as its value:
`attempt` returns it.
"""

from __future__ import annotations

import ast
import inspect
import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import count
from typing import Any

from luthier.errors import RecipeError


def bundle(description: str = "", name: str = "") -> Callable[[Callable[..., Any]], Callable[..., Node]]:
    """A function on values becomes one on nodes, whose every call is recorded. description: what it does;
    without one, its docstring.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Node]:
        purpose = description or (inspect.getdoc(function) or "").strip()

        @wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Node:
            positional = [as_node(value) for value in args]
            by_name = {key: as_node(value) for key, value in kwargs.items()}
            origin = {
                "function": name or function.__name__,
                "description": purpose,
                "parents": (*positional, *by_name.values()),
                "arguments": (*[""] * len(args), *kwargs),
            }
            values = [node.data for node in positional]
            values_by_name = {key: node.data for key, node in by_name.items()}
            try:
                return Node(function(*values, **values_by_name), **origin)
            except Exception as error:
                raise Failed(Node(f"{type(error).__name__}: {error}", failed=True, **origin)) from error

        return traced

    return wrap


def reflected(operation: Callable[..., Node]) -> Callable[..., Node]:
    """An operator for where the node stands on the right: 3 - x."""
    return lambda right, left: operation(left, right)


@dataclass(eq=False)
class Node:
    """A value, and where it came from."""

    data: Any
    name: str = ""  # nodes without one are named where they are listed
    trainable: bool = False  # may an optimizer propose another value?
    constraint: str = ""  # what a proposal must keep to, in words
    function: str = ""  # what computed it, '' for an input
    description: str = ""  # what that function does
    parents: tuple[Node, ...] = ()  # its arguments
    arguments: tuple[str, ...] = ()  # their names in the function, '' where they have none
    failed: bool = False  # is the value the text of an error?

    # operators are bundles, too
    __getitem__ = bundle("The entry of a collection.", name="item")(operator.getitem)
    __iter__ = None  # type: ignore[assignment]  # or `for x in node` would index for ever
    __add__ = bundle("a + b.", name="add")(operator.add)
    __radd__ = reflected(__add__)
    __sub__ = bundle("a - b.", name="subtract")(operator.sub)
    __rsub__ = reflected(__sub__)
    __mul__ = __rmul__ = bundle("a * b.", name="multiply")(operator.mul)
    __truediv__ = bundle("a / b.", name="divide")(operator.truediv)
    __rtruediv__ = reflected(__truediv__)


def node(data: Any, name: str = "", trainable: bool = False, constraint: str = "") -> Node:
    """A value of the graph. Trainable ones are text, numbers, truth values, or lists and dicts of them."""
    if trainable and not name:
        raise RecipeError("a trainable node needs a name, so that a model can propose another value for it")
    return Node(data, name, trainable, constraint)


class Failed(Exception):
    """A bundle raised; `node` holds the error's text, and its parents are the arguments."""

    def __init__(self, node: Node):
        super().__init__(node.data)
        self.node = node


def as_node(value: Any) -> Node:
    """A node stays itself; another value becomes one."""
    return value if isinstance(value, Node) else Node(value)


def attempt(workflow: Callable[..., Node], *args: Any, **kwargs: Any) -> Node:
    """What a workflow comes to; where a bundle in it raises, the node that says so."""
    try:
        return workflow(*args, **kwargs)
    except Failed as error:
        return error.node


def ancestors(*outputs: Node) -> list[Node]:
    """The outputs and everything they were computed from, arguments before results; each once."""
    order: list[Node] = []
    visited: set[int] = set()
    stack = [(n, False) for n in reversed(outputs)]
    while stack:
        here, left = stack.pop()
        if left:
            order.append(here)
        elif id(here) not in visited:
            visited.add(id(here))
            stack.append((here, True))
            stack.extend((p, False) for p in reversed(here.parents))
    return order


def names_of(nodes: Sequence[Node]) -> dict[int, str]:
    """id -> a name of its own for each node. Raises RecipeError where two nodes bear the same name."""
    by_name: dict[str, Node] = {}
    for n in nodes:
        if n.name and by_name.setdefault(n.name, n) is not n:
            raise RecipeError(f"two nodes have the name '{n.name}'")
    names: dict[int, str] = {}
    taken = set(by_name)
    for n in nodes:
        stem = n.function or "input"
        free = (f"{stem}{k}" for k in count() if f"{stem}{k}" not in taken)
        names[id(n)] = n.name or next(free)
        taken.add(names[id(n)])
    return names


@bundle("The function that the code defines last, called with these arguments, in the sandbox.", name="call")
def call(source: str, *args: Any) -> Any:
    """Runs code that is itself a node: `call(node("def f(x): ...", "f", trainable=True), 3)`. Arguments and
    result are plain data.
    """
    from luthier.sandbox.sandbox import run

    defined = [n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
    if not defined:
        raise ValueError("the code defines no function")
    arguments = json.dumps(list(args))
    end = f"\nimport json\nprint()\nprint(json.dumps({defined[-1]}(*json.loads({arguments!r}))))\n"
    done = run(source + end, timeout=10, memory_mb=512)
    if not done.ok:
        raise RuntimeError(done.reason)
    return json.loads(done.stdout.rstrip().rsplit("\n", 1)[-1])
