"""What a run is doing now, as a file beside it, for whoever watches it from another process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from luthier.report.console import Callback
from luthier.storage.layout import STATUS

INTERVAL = 0.25  # seconds between two writes at least, unless something else is done now


class StatusFile(Callback):
    """Hands everything on to another callback, and writes what is being done to FOLDER/status.json.

    The file holds {"doing": "evaluating before training", "done": 3, "of": 16, "unit": "rows", "step": 0,
    "steps": 80, "left": seconds or null}: what is counted belongs to `doing`, steps are those of the run.
    Where it cannot be written the run goes on without it.
    """

    def __init__(self, callback: Any, folder: Path):
        super().__init__()
        self.callback, self.path = callback, Path(folder) / STATUS
        self.status: dict[str, Any] = {"doing": "", "done": None, "of": None, "unit": ""}
        self.status |= {"step": 0, "steps": 0, "left": None}
        self.notes = callback.notes
        self.written = float("-inf")  # when, by this process's clock
        self.began, self.first = time.monotonic(), 0

    def update(self, at_once: bool = False, **changes: Any) -> None:
        """Write what has changed, unless that was done just now."""
        self.status |= changes
        now = time.monotonic()
        if not at_once and now - self.written < INTERVAL:
            return
        self.written = now
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        with suppress(OSError):
            beside.write_text(json.dumps(self.status), encoding="utf-8")
            beside.replace(self.path)

    def warn(self, sentence: str) -> None:
        self.callback.warn(sentence)

    def stage(self, name: str) -> None:
        self.update(at_once=True, doing=name, done=None, of=None, unit="")
        self.callback.stage(name)

    @contextmanager
    def working(self, name: str) -> Iterator[Callable[[int, int, str], None]]:
        before = dict(self.status)
        self.update(at_once=True, doing=name, done=None, of=None, unit="")

        with self.callback.working(name) as progress:

            def count(done: int, of: int, what: str) -> None:
                self.update(done=done, of=of, unit=what)
                progress(done, of, what)

            yield count
        self.update(at_once=True, **before)

    def rows(self, roles: Any, rows: Any, stats: dict) -> None:
        self.callback.rows(roles, rows, stats)

    @contextmanager
    def training(self, total: int, done: int) -> Iterator[None]:
        self.began, self.first = time.monotonic(), done
        self.update(at_once=True, doing="training", done=None, of=None, step=done, steps=total, left=None)
        with self.callback.training(total, done):
            yield

    def step(self, log: dict) -> None:
        step, steps = log["step"], self.status["steps"]
        left = None
        if self.first < step <= steps:  # what is saved and evaluated on the way counts too
            left = (time.monotonic() - self.began) / (step - self.first) * (steps - step)
        self.update(at_once=step == steps, step=step, left=left)
        self.callback.step(log)

    def finish(self, report: Any) -> None:
        self.callback.finish(report)
