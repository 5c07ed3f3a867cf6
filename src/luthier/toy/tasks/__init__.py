"""The toy tasks: generated, with exact verifiers. A task is a file of this folder; its stem is its name."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from ._sample import near


def names() -> list[str]:
    """The names of all toy tasks."""
    return sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))


def find(name: str) -> ModuleType:
    """The module of a task; an unknown name is answered by the known ones."""
    if name not in names():
        raise ValueError(f"no toy task {name!r}; there are {', '.join(names())}{near(name, names())}")
    return import_module(f"{__name__}.{name}")


def rows(task: str, split: str, n: int, seed: int | str = 0) -> list[dict]:
    """n rows of a task's split; the same arguments give the same rows in every process."""
    return find(task).rows(split, n, seed)
