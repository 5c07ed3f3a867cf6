"""What hostile inputs share: a bound on the time of each, values that nobody meant, and the figures at the
end.
"""

from __future__ import annotations

import os
import random
import signal
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

SECONDS = 20.0  # of this process's own time that one input may take
COUNT = int(os.environ.get("LUTHIER_HOSTILE", "2000"))  # inputs of each kind
SEED = int(os.environ.get("LUTHIER_HOSTILE_SEED", "0"))


class Hang(BaseException):
    """An input took too long."""


TIMERS = {signal.ITIMER_VIRTUAL: signal.SIGVTALRM, signal.ITIMER_REAL: signal.SIGALRM}


@contextmanager
def limited(seconds: float = SECONDS, waiting: float = 600.0):
    """Raises Hang in what takes longer; the time of other processes does not count, unless it waits for very
    long.
    """

    def end(*_):
        raise Hang

    before = {alarm: signal.signal(alarm, end) for alarm in TIMERS.values()}
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, waiting)
    try:
        yield
    finally:
        for timer, alarm in TIMERS.items():
            signal.setitimer(timer, 0)
            signal.signal(alarm, before[alarm])


def place_of(error: BaseException) -> str:
    """Where an error was raised: 'luthier/storage/files.py:12'."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/luthier/" in frame.filename] or frames
    return f"{own[-1].filename.rpartition('/src/')[2]}:{own[-1].lineno}"


BAD = ("tracebacks", "hangs", "rows lost", "silently different")


@dataclass
class Tally:
    """What became of the inputs of a fuzzer."""

    label: str
    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, outcome: str, detail: str = "") -> None:
        self.counts[outcome] += 1
        if detail:
            self.failures.append(f"{outcome}: {detail}")
            print(f"\n{self.failures[-1]}", flush=True)

    def close(self) -> None:
        """Print the figures; fail where anything but a result or a sentence came out."""
        total = sum(self.counts.values())
        bad = {name: self.counts[name] for name in BAD}
        others = {name: n for name, n in sorted(self.counts.items()) if name not in bad}
        figures = ", ".join(f"{name} {n}" for name, n in (bad | others).items())
        print(f"\n{self.label}: tried {total}, {figures} (seed {SEED})")
        assert not self.failures, "\n".join(self.failures[:20])


def hostile_value(random: random.Random):
    """A value that no setting is made for."""
    deep: object = "x"
    for _ in range(random.choice((5, 30, 55))):
        deep = random.choice(([deep], {"name": deep}))
    return random.choice(
        (
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            7,
            10**30,
            -(10**30),
            2**63,
            10**4000,
            1e308,
            -1e308,
            0.5,
            -0.1,
            float("nan"),
            float("inf"),
            "",
            " ",
            "a" * 3000,
            "a\0b",
            "\x1b[2J",
            "é" * 50,
            "1e5",
            "-3",
            "null",
            "{name: lora}",
            "../../etc/passwd",
            "/proc/1/x",
            "/dev/zero",
            "~nobody/x",
            "toy:",
            "toy:sums",
            "sft",
            "sft + ",
            "0.5*sft + 1..2*dpo",
            "lora",
            [],
            [[]],
            [None],
            ["lora", "ssf"],
            [["lora", "ssf"]],
            [1, 2],
            {},
            {"name": []},
            {"name": None},
            {"name": {"name": "lora"}},
            {"name": "lora", "r": -1},
            {1: 2},
            {"": ""},
            {"name": "sft", "weight": "x"},
            {None: None},
            deep,
            [{"name": "lora"}] * 50,
        )
    )
