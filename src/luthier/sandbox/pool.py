"""Cells of the sandbox that are up and wait for programs: started once, used for many programs.

A cell is a keeper's process behind its walls (`cell/keeper.py`). It takes one order at a time; as many cells
as programs run at once are started, and they end with this process.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from . import limits
from .cell import bubblewrap

HERE = str(Path(__file__).resolve().parent)
ROOT_MODE, BUBBLEWRAP_MODE, FILTER_MODE, NO_MODE = "root", "bubblewrap", "filter", "none"
# from the strongest on; the first that stands is taken
MODES = (ROOT_MODE, BUBBLEWRAP_MODE, FILTER_MODE, NO_MODE)


class CellError(RuntimeError):
    """A cell that does not start, or broke."""


@dataclass
class Outcome:
    """How a process in a cell ended."""

    status: int  # exit status; 128 + the number of a signal
    late: bool = False
    walls: dict[str, bool] = field(default_factory=dict)  # what stood


class Cell:
    """A keeper's process, and the socket over which it gets orders."""

    def __init__(self, mode: str, packages: bool):
        self.mode, self.packages = mode, packages
        door, files, here = self.door()
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        place = tempfile.mkdtemp(prefix="luthier-")
        numbers = f"{theirs.fileno()}, {mode!r}, {place!r}, {packages}"
        begin = (
            f"import sys; sys.path[0] = {here!r}; from cell import keeper; del sys.path[0];"
            f" keeper.main({numbers})"
        )
        flags = ["-s", "-B", "-X", "utf8"] + ([] if packages else ["-S"])
        environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "TMPDIR": "/tmp"}
        try:
            self.process = subprocess.Popen(
                [*door, sys.executable, *flags, "-c", begin],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd="/",
                pass_fds=(theirs.fileno(), *files),
                start_new_session=True,
            )
            theirs.close()
            first = self.answer(limits.START)
        except BaseException:
            self.line.close()
            raise
        finally:
            theirs.close()
            for file in files:
                os.close(file)
            shutil.rmtree(place, ignore_errors=True)
        if first["problem"]:
            self.close()
            raise CellError(first["problem"])

    def door(self) -> tuple[list[str], list[int], str]:
        """(words before those of the keeper, open files that they name, where the keeper finds its code)."""
        if self.mode != BUBBLEWRAP_MODE:
            return [], [], HERE
        command = bubblewrap.command(self.packages)
        if command is None:
            raise CellError("bubblewrap (bwrap) is not installed")
        return *command, bubblewrap.CODE

    def answer(self, seconds: float) -> dict:
        """The keeper's next message; CellError, and the cell gone, where there is none."""
        self.line.settimeout(seconds)
        try:
            data = self.line.recv(1 << 16)
            return json.loads(data)
        except (OSError, ValueError) as error:
            self.close()
            raise CellError(f"the sandbox's keeper does not answer ({error})") from None

    def send(self, order: dict, files: list[int]) -> None:
        """Start a process with these files as its 0, 1, 2, ..."""
        try:
            socket.send_fds(self.line, [json.dumps(order).encode()], files)
        except OSError as error:
            self.close()
            raise CellError(f"the sandbox's keeper has ended ({error})") from None

    def end(self, seconds: float) -> Outcome:
        """Wait for the process that was started."""
        answer = self.answer(seconds)
        return Outcome(answer["status"], answer["late"], answer["walls"])

    def close(self) -> None:
        """End the keeper, and with it all that runs in the cell."""
        with suppress(OSError):
            self.line.close()
        with suppress(OSError):
            os.killpg(self.process.pid, 9)
        with suppress(OSError, subprocess.SubprocessError):
            self.process.wait(10)


class Pool:
    """Cells that nobody uses at the moment, by what they are."""

    def __init__(self):
        self.lock = threading.Lock()
        self.idle: dict[tuple[str, bool], list[Cell]] = {}
        self.problems: dict[str, str] = {}  # by mode, why it does not stand on this machine
        self.best: str | None = None

    def mode(self) -> str:
        """The strongest walls that stand on this machine."""
        if self.best is None:
            for mode in MODES:
                try:
                    self.give_back(Cell(mode, False))
                except CellError as error:
                    self.problems[mode] = str(error)
                    continue
                self.best = mode
                break
            else:
                raise CellError(self.problems[NO_MODE])
        return self.best

    def take(self, packages: bool, mode: str | None = None) -> Cell:
        """A cell for one process at a time."""
        mode = mode or self.mode()
        with self.lock:
            cells = self.idle.get((mode, packages))
            while cells:
                cell = cells.pop()
                if cell.process.poll() is None:
                    return cell
        return Cell(mode, packages)

    def give_back(self, cell: Cell) -> None:
        """The cell waits for the next one."""
        with self.lock:
            self.idle.setdefault((cell.mode, cell.packages), []).append(cell)

    def close(self) -> None:
        """End all cells that wait."""
        with self.lock:
            cells = [cell for waiting in self.idle.values() for cell in waiting]
            self.idle.clear()
        for cell in cells:
            cell.close()

    def forget(self) -> None:
        """In a forked process: the cells are its parent's."""
        self.lock = threading.Lock()
        for waiting in self.idle.values():
            for cell in waiting:
                cell.line.close()
        self.idle = {}


POOL = Pool()
atexit.register(POOL.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=POOL.forget)


def stranger() -> int:
    """Who root becomes: a user number that no system gives out."""
    return 0x40000000 + secrets.randbelow(1 << 29)
