"""A function of your own as a reward: `file.py:name`, called in this process or in the sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from luthier.methods.rewards._base import Reward
from luthier.registry import reward
from luthier.sandbox.sandbox import run_many
from luthier.storage.user_code import load_named, split_path

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
        file, name = split_path(self.path)
        if not self.sandbox:
            load_named(file, name, "reward 'function'")

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        file, name = split_path(self.path)
        if self.sandbox:
            return self.apart(Path(file).expanduser().read_text(encoding="utf-8"), name, row, texts)
        function = load_named(file, name, "reward 'function'")
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
