"""A world of your own: a class of a Python file, `file.py:Class`."""

from __future__ import annotations

from typing import Any

from luthier.errors import RecipeError
from luthier.methods.environments._base import Environment
from luthier.registry import environment
from luthier.storage.user_code import load_named, split_path


@environment(
    use_when="the world is your own: a game, a browser, a set of tools.",
    costs="your code's time at every action.",
)
class Function(Environment):
    """`Class(row, seed)` with `reset() -> observation` and `step(action) -> (observation, reward, over)`. An
    attribute `tools`, a list of JSON schemas, is shown to the model by its chat template; `close()` is called
    at the end. The file is trusted and runs in this process: what a model writes belongs into
    `luthier.sandbox`.
    """

    path: str  # file and class, e.g. maze.py:Maze

    def __post_init__(self):
        load_named(*split_path(self.path, "Class"), "environment 'function'")

    def world(self, row: dict, seed: int) -> Any:
        world = load_named(*split_path(self.path, "Class"), "environment 'function'")(row, seed)
        for name in ("reset", "step"):
            if not callable(getattr(world, name, None)):
                raise RecipeError(f"environment 'function': {self.path} has no method '{name}'")
        return world
