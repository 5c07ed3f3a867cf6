"""A function of your own as a reward: `file.py:name`, called in this process or in the sandbox."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.rewards._base import Reward
from luthier.registry import reward
from luthier.sandbox.sandbox import run_many

ANSWER_MARK = "\0score:"


@reward(
    use_when="no other reward measures what you want and a few lines of Python do.",
    costs="your function's time; in the sandbox a process for each completion.",
)
class Function(Reward):
    """`def name(row, text) -> float`: the higher the better. The file is trusted and run here; with
    `sandbox` it runs apart, without files and network, and sees the row as JSON.
    """

    path: str  # file and function, e.g. rewards.py:brevity
    sandbox: bool = False  # call it in the sandbox: for a function that runs what a model wrote
    timeout: Annotated[float, Field(gt=0)] = 5.0  # seconds of a call in the sandbox; a later one scores 0
    memory_mb: Annotated[int, Field(ge=16)] = 512  # memory of a call in the sandbox

    def __post_init__(self):
        file, _, name = self.path.rpartition(":")
        if not file.endswith(".py") or not name.isidentifier():
            raise ValueError(f"path: '{self.path}' is not file.py:function")
        if not Path(file).expanduser().is_file():
            raise ValueError(f"path: there is no file {file}")
        if not self.sandbox:
            loaded(file, name)

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        file, _, name = self.path.rpartition(":")
        if self.sandbox:
            return self.apart(Path(file).expanduser().read_text(encoding="utf-8"), name, row, texts)
        function = loaded(file, name)
        return [function(row, text) for text in texts]

    def apart(self, source: str, name: str, row: dict, texts: list[str]) -> list[float]:
        """Each text in a process of its own; 0 where the function fails, or says no number."""
        plain = json.loads(json.dumps(row, default=str))
        jobs = []
        for text in texts:
            call = f"print({ANSWER_MARK!r} + repr(float({name}({plain!r}, {text!r}))))"
            job = {"code": f"{source}\n{call}\n", "timeout": self.timeout, "memory_mb": self.memory_mb}
            jobs.append(job)
        scores = []
        for result in run_many(jobs):
            _, mark, number = result.stdout.rpartition(ANSWER_MARK)
            scores.append(float(number) if mark and result.ok else 0.0)
        return scores


@cache
def loaded(file: str, name: str) -> Callable[[dict, str], Any]:
    """The function of a file, imported once. Raises RecipeError where it is not there."""
    path = Path(file).expanduser().resolve()
    described = importlib.util.spec_from_file_location(f"luthier_reward_{path.stem}", path)
    if described is None or described.loader is None:
        raise RecipeError(f"reward 'function': {file} cannot be imported")
    module = importlib.util.module_from_spec(described)
    try:
        described.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f"reward 'function': {file} cannot be imported: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"reward 'function': {file} has no function '{name}'")
    return function
