"""1 where a text's last answer equals the row's `answer` as mathematics: 1/2, 0.5 and \\boxed{\\frac{1}{2}}
are equal.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import warnings
from importlib.util import find_spec

from luthier.errors import RecipeError
from luthier.methods.formats._base import ANSWER
from luthier.methods.rewards._base import Reward
from luthier.registry import reward
from luthier.sandbox import limits

VERDICTS = {"true\n": True, "false\n": False, "null\n": None}  # what a worker writes
DIGITS = re.compile(rf"[0-9]{{{limits.DIGITS}}}")
BRACKETS = re.compile(r"[()\[\]{}]")
IDLE: list[Worker] = []  # workers nobody is using; list.pop and list.append are safe between threads
os.register_at_fork(after_in_child=IDLE.clear)  # a forked process must not share its parent's pipes


@reward(
    requires=[ANSWER],
    use_when="answers are mathematics that may be written in several ways; needs the package math-verify.",
    costs="a comparison in a process of its own for each completion, up to `timeout` seconds.",
)
class Math(Reward):
    """Parses LaTeX, plain numbers, fractions, sets and intervals with the library math-verify.

    A comparison that takes too long scores 0: it runs in a separate process that is killed, so this works in
    any thread. The library's own time limit is a signal, which only the main thread may set.
    """

    timeout: float = 5.0  # maximum seconds per text
    memory_mb: int = 4096  # memory limit of the process that compares

    def __post_init__(self):
        if find_spec("math_verify") is None:
            raise RecipeError("reward 'math' needs math-verify: pip install 'math-verify[antlr4_13_2]'")

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """1.0 or 0.0 per text."""
        gold = str(self.column(row, "answer"))
        return [self.score(gold, text) for text in texts]

    def score(self, gold: str, text: str) -> float:
        """One comparison, by an idle worker if there is one."""
        text = text[-limits.ANSWER :]
        if hostile(text):
            return float(text.strip() == gold.strip())
        try:
            worker = IDLE.pop()
        except IndexError:
            worker = Worker(self.memory_mb)
        if worker.memory_mb != self.memory_mb or worker.process.poll() is not None:
            worker.process.kill()
            worker = Worker(self.memory_mb)
        try:
            verdict = worker.ask([gold, text], self.timeout)
        except BaseException:  # an interrupt leaves an answer in the pipe that would go to the next question
            worker.process.kill()
            raise
        if worker.alive:
            IDLE.append(worker)
        if verdict is None:
            warnings.warn(
                f"reward 'math' cannot parse the reference {gold!r}; it is compared as text", stacklevel=2
            )
            return float(text.strip().rsplit("\n", 1)[-1].strip() == gold.strip())
        return float(verdict)


def hostile(text: str) -> bool:
    """Is it no mathematics that anyone writes: endless numbers, or brackets in brackets without end?"""
    if DIGITS.search(text):
        return True
    depth = 0
    for bracket in BRACKETS.findall(text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        if depth > limits.BRACKETS:
            return True
    return False


class Worker:
    """A process that compares; it ends with its parent, because its input ends."""

    def __init__(self, memory_mb: int):
        # -I and the path by hand: started any other way, the folder of this file could hide Python's `math`
        serve = f"from luthier.sandbox.math_worker import serve; serve({memory_mb})"
        start = f"import sys; sys.path[:] = {sys.path!r}; {serve}"
        self.memory_mb = memory_mb
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self.alive = True
        if self.line(120) != "ready\n":
            raise RuntimeError(
                "the process that compares answers does not start; check the installation of math-verify"
            )

    def ask(self, question: list[str], timeout: float) -> bool | None:
        """The worker's verdict; False, and the worker gone, where it took too long or died."""
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError:
            self.alive = False
            return False
        answer = self.line(timeout)
        return VERDICTS.get(answer, False)

    def line(self, timeout: float) -> str:
        """The next line the worker writes; '' after killing it."""
        timer = threading.Timer(timeout, self.process.kill)
        timer.daemon = True
        timer.start()
        line = self.process.stdout.readline(64)
        timer.cancel()
        if not line:
            self.alive = False
            self.process.kill()
            self.process.wait()
        return line
