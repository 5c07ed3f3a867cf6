"""Start-up of the command line: what transformers imports and one process on one machine does not use can
wait: torch's compiler, sharded tensors, scipy.

Together they take two thirds of the time in which a model class is imported. While transformers is imported,
names of these modules are stand-ins: each becomes the real thing where it is called, subclassed or asked for
an attribute later on, and nothing is an instance of a class whose module nobody has loaded. Where a launcher
has started several processes nothing waits, since transformers' own parallelism keeps such values from import
on.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from luthier import compat

WAITING = (
    "torch._dynamo",
    "torch._dynamo._trace_wrapped_higher_order_op",
    "torch.distributed.tensor",
    "torch.distributed.tensor._utils",
    "torch.distributed.tensor.placement_types",
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed._composable.fsdp",
    "torch.distributed._functional_collectives",
    "torch.distributed.fsdp",
    "torch.nn.attention.flex_attention",
    "transformers.integrations.flex_attention",
    "scipy.optimize",
)


MODELS = (
    "transformers.modeling_utils",
    "transformers.masking_utils",
    "transformers.modeling_layers",
    "transformers.generation.utils",
)


def import_models() -> None:
    """Import what every transformers model needs; what only some need waits."""
    if MODELS[0] not in sys.modules and compat.keeps():
        with waiting():
            for name in MODELS:
                import_module(name)
    if _often:
        gc.freeze()
        gc.set_threshold(*_often.pop())


_often: list[tuple[int, int, int]] = []  # how often garbage is looked for, once models can be loaded


def rarely() -> None:
    """For a process of our own, at its start: what is imported stays, and looking for garbage among it took
    an eighth of the time up to the first step. So it is looked for rarely until models can be loaded, and
    among what was imported never again.
    """
    _often.append(gc.get_threshold())
    gc.set_threshold(500_000)  # what is imported is some 370,000 objects


@dataclass(eq=False)
class After(MetaPathFinder):
    """Finds a module as the other finders would, and does something with it once it has been executed."""

    name: str
    then: Callable[[ModuleType], None]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        spec = None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                break
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del spec.loader.exec_module  # the loader is as it was
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.then(module)

        spec.loader.exec_module = exec_module
        return spec


def after(name: str, then: Callable[[ModuleType], None]) -> None:
    """Now where the module is imported already, else as soon as it is."""
    if name in sys.modules:
        then(sys.modules[name])
        return
    expected = [finder.name for finder in sys.meta_path if isinstance(finder, After)]
    if name not in expected:
        sys.meta_path.insert(0, After(name, then))


READER = "transformers.utils.import_utils"


def read_once(reader: ModuleType) -> None:
    """While transformers is imported it reads the files of all its models for what each offers, twice, and
    splits each into lines for the last that begins with __all__. Reading once and splitting from that line on
    finds the same in a third of the time.
    """
    walk = getattr(reader, "create_import_structure_from_path", None)
    listed = getattr(reader, "fetch__all__", None)
    if walk is None or listed is None:
        return
    once = cache(walk)
    reader.create_import_structure_from_path = lambda path: once(
        os.path.dirname(path) if os.path.isfile(path) else os.fspath(path)
    )
    reader.fetch__all__ = lambda text: listed(text[max(0, text.rfind("\n__all__")) :])


FILLED = ("normal_", "uniform_", "trunc_normal_", "constant_", "ones_", "zeros_", "zero_", "fill_")
FILLED += tuple(f"{name}_{kind}_" for name in ("kaiming", "xavier") for kind in ("normal", "uniform"))


def unfilled() -> Any:
    """While a network is laid out without memory (device meta): nothing is filled, and ranges of numbers are
    real ones.

    Either would have torch import its symbolic shapes, with sympy, to compute nothing: 0.4 s. Rotary
    frequencies come out as they would, since transformers makes them again once weights are there.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Unfilled(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            tensor = args[0] if args else kwargs.get("tensor")
            if torch.is_tensor(tensor) and tensor.is_meta and getattr(func, "__name__", "") in FILLED:
                return tensor
            if func is torch.arange and str(kwargs.get("device")) == "meta":
                kwargs = {**kwargs, "device": "cpu"}
            return func(*args, **kwargs)

    return Unfilled()


@contextmanager
def waiting() -> Iterator[None]:
    """Stand-ins for a while, for what nobody has imported yet."""
    import torch  # it uses some of these modules itself, and then they are the real ones

    if not compat.keeps():
        yield
        return
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    put = {}
    for name in WAITING:
        if alone and name not in sys.modules and find_spec(name.partition(".")[0]):
            put[name] = Waiting(name)
    compiler = Compiler()
    if dynamo := put.get("torch._dynamo"):
        vars(dynamo).update(
            assume_constant_result=constant, disable=compiler.disable, allow_in_graph=compiler.allow_in_graph
        )
    # PEFT takes it for there; the real one takes this place when it comes
    if tensor := put.get("torch.distributed.tensor"):
        torch.distributed.tensor = tensor
    sys.modules.update(put)
    try:
        yield
    finally:
        _let_in()
        for fn in compiler.bare:
            vars(fn).pop("__dynamo_disable", None)


def _let_in() -> None:
    """From here on the real modules are found."""
    for name in WAITING:
        if isinstance(sys.modules.get(name), Waiting):
            del sys.modules[name]


class Waiting(ModuleType):
    """A module that is not loaded yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Later(self.__name__, name)


class Later:
    """A name of such a module; with `args`, the result of calling it with these."""

    def __init__(self, module: str, name: str, args: tuple | None = None):
        self.__dict__.update(
            _module=module, _name=name, _args=args, __name__=name, __qualname__=name, __module__=module
        )

    def _real(self) -> Any:
        _let_in()
        real = getattr(import_module(self._module), self._name)
        if self._args is not None:
            real = real(*self._args)
        return real

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and isinstance(sys.modules.get(self._module), Waiting):
            return Later(self._module, self._name, args)
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the interpreter asks anything for these
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __mro_entries__(self, bases: Any) -> tuple[Any, ...]:
        return (self._real(),)

    def __or__(self, other: Any) -> Any:  # an annotation
        return self

    __ror__ = __or__

    def __instancecheck__(self, value: Any) -> bool:
        return self._loaded() and isinstance(value, self._real())

    def __subclasscheck__(self, kind: Any) -> bool:
        return self._loaded() and issubclass(kind, self._real())

    def _loaded(self) -> bool:
        return self._module in sys.modules and not isinstance(sys.modules[self._module], Waiting)


def constant(fn: Any) -> Any:
    """torch._dynamo.assume_constant_result: a mark for the compiler."""
    fn._dynamo_marked_constant = True
    return fn


@dataclass
class Compiler:
    """What torch._dynamo is asked before it is there."""

    allowed: list[Any] = field(default_factory=list)
    # torch's own functions that ran without the compiler's mark, and shall ask for it again
    bare: list[Any] = field(default_factory=list)

    def disable(
        self, fn: Any = None, recursive: bool = True, *, reason: str | None = None, wrapping: bool = True
    ) -> Any:
        """As torch itself says it where the compiler may not be loaded yet."""
        from torch._compile import _disable_dynamo

        if wrapping:
            return _disable_dynamo(fn, recursive)
        self.bare.append(fn)
        return fn

    def allow_in_graph(self, fn: Any) -> Any:
        """The compiler is told as soon as it is there."""
        self.allowed.append(fn)
        if len(self.allowed) == 1:
            sys.meta_path.insert(
                0, After("torch._dynamo", lambda dynamo: dynamo.allow_in_graph(self.allowed))
            )
        return fn
