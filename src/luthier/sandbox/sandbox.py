"""Runs code that a model wrote: in a fresh interpreter behind walls of the kernel, killed when late.

What holds depends on the machine; `sandbox_report` tests it, docs/trust.md says what is promised.

- On Linux, where the kernel lets root or ordinary users make namespaces: a root of its own with Python and
  the system's libraries alone (read-only), an empty disk in memory as its folder, no network interface,
  processes of its own that all die with the first, no privilege, and a filter of system calls. Started by
  root, it becomes a user that nobody has.
- On Linux where ordinary programs may not, and bubblewrap is installed and may: the same root by `bwrap`, and
  the filter, which then refuses processes and sockets altogether.
- On Linux without namespaces: the filter alone, which then refuses processes and sockets altogether, and
  Landlock, which leaves only Python's files to be read.
- Everywhere: a new interpreter with the standard library alone, a new working folder, an empty environment,
  limits on time, memory, file size and open files, bounded output, and an audit hook (`sys.addaudithook`),
  which refuses in plain words what the walls would refuse.

Checks are judged in a second process that never ran the program (`cell/judge.py`): the program's process gets
arguments and gives values, and neither sees nor decides what they are compared with.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

from . import limits
from .limits import DISK_MB, OUTPUT, PROCESSES
from .pool import BUBBLEWRAP_MODE, FILTER_MODE, NO_MODE, POOL, ROOT_MODE, Cell, CellError, Outcome, stranger


@dataclass(frozen=True)
class Result:
    """What became of a program."""

    ok: bool  # it ran to its end, and every check passed
    stdout: str  # what it printed, cut after 64 KiB; bytes that are not UTF-8 are replaced
    stderr: str
    reason: str  # why not: timeout | memory | exit N | signal N | the error; '' when ok
    passed: tuple[bool, ...] = ()  # per check


def run(
    code: str,
    *,
    timeout: float,
    memory_mb: int,
    stdin: str = "",
    checks: Sequence[str] = (),
    packages: bool = False,
) -> Result:
    """Run a program, then each check (Python that raises when something is wrong) among the program's names.

    The checks run in another process, with stand-ins for the program's names: what it calls runs in the
    program's process and gives values; comparisons and Python's own functions are not the program's. After a
    check that does not end, the checks behind it have failed. `packages` lets the code import what is
    installed here.
    """
    return _run(code, timeout=timeout, memory_mb=memory_mb, stdin=stdin, checks=checks, packages=packages)[0]


def run_many(jobs: Iterable[dict], workers: int | None = None) -> list[Result]:
    """`run(**job)` for every job, as many at a time as there are cores; results in the order of the jobs."""
    jobs = list(jobs)
    if len(jobs) < 2:
        return [run(**job) for job in jobs]
    with ThreadPoolExecutor(min(workers or cores(), len(jobs))) as pool:
        return list(pool.map(lambda job: run(**job), jobs))


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def kernel_walls() -> bool:
    """Does any wall of the kernel stand here, so that code nobody read may run?"""
    return POOL.mode() != NO_MODE


@cache
def sandbox_report() -> dict[str, bool]:
    """What the sandbox gives on this machine: the first four as tested, the others as the kernel reports."""
    walls = _run("", timeout=20, memory_mb=256)[1]
    hog = run("x = bytearray(1 << 30)", timeout=20, memory_mb=256)
    late = run("while True: pass", timeout=0.3, memory_mb=256)
    fence = run("open('/dev/full', 'w')", timeout=20, memory_mb=256)
    return {
        "runs programs": bool(walls),
        "kills programs that run too long": late.reason == "timeout",
        "limits memory": hog.reason == "memory",
        "audit hook": fence.reason.startswith("PermissionError"),
        "no network (kernel)": walls.get("network", False),
        "read-only file system (kernel)": walls.get("read_only", False),
        "root folder of its own (kernel)": walls.get("own_root", False),
        "other processes hidden (kernel)": walls.get("processes", False),
        "filter of system calls (kernel)": walls.get("filter", False),
        "Landlock, where there is no root folder of its own (kernel)": walls.get("landlock", False),
        "limited number of processes (kernel)": walls.get("counted", False),
        "not root": walls.get("not_root", os.getuid() != 0),
    }


def missing_walls() -> str:
    """A sentence on what this machine does not give, or ''."""
    mode = POOL.mode()
    if mode == ROOT_MODE:
        if sandbox_report()["filter of system calls (kernel)"]:
            return ""
        return "the sandbox has no filter of system calls here (the kernel has no seccomp for this processor)"
    why = POOL.problems.get(ROOT_MODE, "")
    if mode == BUBBLEWRAP_MODE:
        return f"the sandbox stands inside bubblewrap ({why}); programs start no processes or threads there"
    if mode == FILTER_MODE:
        rest = "programs run behind a filter of system calls"
        if sandbox_report()["Landlock, where there is no root folder of its own (kernel)"]:
            return f"the sandbox has no namespaces here ({why}); {rest} and Landlock"
        return f"the sandbox has no namespaces here ({why}) and no Landlock; {rest} and can read files"
    return f"the sandbox has no walls of the kernel here ({why}); only an audit hook holds programs back"


def _run(
    code: str,
    *,
    timeout: float,
    memory_mb: int,
    stdin: str = "",
    checks: Sequence[str] = (),
    packages: bool = False,
    hook: bool = True,
    walls: bool | str = True,
) -> tuple[Result, dict[str, bool]]:
    """The result, and which walls of the kernel stood. Without `hook` or `walls` each can be tried alone;
    `walls` may name the kind (`pool.MODES`).
    """
    if len(code) > limits.CODE:
        return Result(False, "", "", "the program is too long", (False,) * len(checks)), {}
    mode = walls if isinstance(walls, str) else None if walls else NO_MODE
    order = {
        "kind": "program",
        "timeout": timeout,
        "grace": limits.GRACE,
        "memory_mb": memory_mb,
        "disk_mb": DISK_MB,
        "files": limits.FILES,
        "processes": PROCESSES,
        "hook": hook,
    }
    job = {"code": code, "hook": hook, "checked": bool(checks)}
    run_once = Run(order, packages, mode)
    if checks:
        run_once.judged(job, list(checks), stdin)
    else:
        run_once.alone(job, stdin)
    return run_once.result(len(checks)), run_once.ended.walls


class Run:
    """One program, and the judge of its checks where it has some."""

    def __init__(self, order: dict, packages: bool, mode: str | None):
        self.order, self.packages, self.mode = order, packages, mode
        self.ended = Outcome(125)
        self.judge_ended = Outcome(0)
        self.output = self.errors = self.verdicts = b""

    def alone(self, job: dict, stdin: str) -> None:
        """A program without checks reports its own end."""
        with Files() as files:
            read, write = files.pipe()
            no_questions = files.holding(b"")
            self.start([(self.order, job, stdin, [no_questions, write])], files, read)

    def judged(self, job: dict, checks: list[str], stdin: str) -> None:
        """A program that answers a judge, whose verdicts count."""
        with Files() as files:
            read, verdicts = files.pipe()
            questions, ask = files.pipe()
            answers, answer = files.pipe()
            judge_order = {**self.order, "kind": "judge"}
            judge_job = {"checks": checks, "hook": self.order["hook"]}
            program = (self.order, job, stdin, [questions, answer])
            judge = (judge_order, judge_job, "", [verdicts, ask, answers])
            self.start([program, judge], files, read)

    def start(self, processes: list[tuple], files: Files, verdicts: int) -> None:
        """Give each process to a cell of its own, read what they write, and wait for their ends."""
        cells: list[Cell] = []
        folders: list[str] = []
        clean = False
        read_out, out = files.pipe()
        read_err, err = files.pipe()
        try:
            for order, job, stdin, numbers in processes:
                cell = POOL.take(self.packages, self.mode)
                cells.append(cell)
                if cell.mode in (FILTER_MODE, NO_MODE):
                    folders.append(tempfile.mkdtemp(prefix="luthier-"))
                    order = {**order, "folder": folders[-1]}
                standard = [files.holding(stdin.encode(errors="replace")), out, err]
                if order["kind"] == "judge":
                    standard[1:] = [files.nothing()] * 2
                everything = [*standard, files.holding(json.dumps(job).encode()), *numbers]
                cell.send({**order, "stranger": stranger()}, everything)
            files.close_written([read_out, read_err, verdicts])
            seconds = self.order["timeout"] + self.order["grace"]
            data = drain([read_out, read_err, verdicts], [cell.line.fileno() for cell in cells], seconds)
            self.output, self.errors, self.verdicts = data
            self.ended = cells[0].end(self.order["grace"] + 1)
            if len(cells) > 1:
                self.judge_ended = cells[1].end(self.order["grace"] + 1)
            clean = True
        except CellError:
            if not POOL.best:
                raise
        finally:
            for cell in cells:
                if clean:
                    POOL.give_back(cell)
                else:
                    cell.close()
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

    def result(self, checks: int) -> Result:
        """What the processes wrote and how they ended, as one result."""
        numbers, errors, ran = set(), [], False
        for what, value in messages(self.verdicts, framed=not checks):
            if what == "passed":
                numbers.add(value)
            elif what in ("error", "failed") or (what == "exit" and value):
                errors.append(str(value))
            elif what in ("end", "ran") or what == "exit":
                ran = ran or what != "exit" or not checks
        passed = tuple(number in numbers for number in range(checks))
        status = self.ended.status
        reason = ""
        if self.ended.late or self.judge_ended.late or status == 128 + signal.SIGXCPU:
            reason = "timeout"
        elif errors:
            reason = errors[0]
        elif not ran:
            if 128 < status < 192:  # the keeper's way to hand a signal on
                reason = f"signal {status - 128}"
            else:
                reason = f"exit {status}"
        elif not all(passed):
            reason = "exit 0"
        output, error = (data.decode(errors="replace") for data in (self.output, self.errors))
        return Result(not reason, output, error, reason, passed)


def messages(data: bytes, framed: bool) -> Iterable[tuple[str, object]]:
    """Verdicts of a judge, a line each; or the messages of a program, behind their lengths."""
    parts = data.split(b"\n")[:-1]  # behind the last line end is half a line
    if framed:
        length = int.from_bytes(data[:8], "little")
        parts = [data[8 : 8 + length]]
    for part in parts:
        try:
            what, value = json.loads(part)
        except (ValueError, TypeError, RecursionError):
            continue
        yield what, value


class Files:
    """Open files of one run, closed together."""

    def __init__(self):
        self.numbers: set[int] = set()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        self.close_written([])

    def pipe(self) -> tuple[int, int]:
        """(end to read, end to write)."""
        ends = os.pipe()
        self.numbers.update(ends)
        return ends

    def nothing(self) -> int:
        """A file that takes everything."""
        number = os.open(os.devnull, os.O_RDWR)
        self.numbers.add(number)
        return number

    def holding(self, data: bytes) -> int:
        """A file with these contents, at its beginning."""
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            number = os.dup(file.fileno())
        self.numbers.add(number)
        return number

    def close_written(self, except_for: list[int]) -> None:
        """Close all but these."""
        for number in self.numbers - set(except_for):
            os.close(number)
        self.numbers &= set(except_for)


def drain(pipes: list[int], lines: list[int], seconds: float) -> list[bytes]:
    """All that is written to pipes, cut after `OUTPUT` bytes each, until every process has ended (its cell's
    line has an answer) and the pipes are empty.
    """
    data = {pipe: bytearray() for pipe in pipes}
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for number in (*pipes, *lines):
            selector.register(number, selectors.EVENT_READ)
        open_pipes, waiting = set(pipes), set(lines)
        while open_pipes or waiting:
            left = deadline - time.monotonic()
            # all processes are gone: what a stray one holds open is not waited for
            events = selector.select(max(0.0, left) if waiting else 0)
            if not events:
                break
            for key, _ in events:
                if key.fd in waiting:
                    waiting.discard(key.fd)
                    selector.unregister(key.fd)
                    continue
                part = os.read(key.fd, 1 << 16)
                data[key.fd] += part[: OUTPUT - len(data[key.fd])]
                if not part:
                    open_pipes.discard(key.fd)
                    selector.unregister(key.fd)
    return [bytes(data[pipe]) for pipe in pipes]
