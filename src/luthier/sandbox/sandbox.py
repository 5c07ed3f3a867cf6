"""Runs code that a model wrote: a fresh interpreter with limits, an empty folder and no network, killed when
late.

What holds depends on the machine; `sandbox_report` tests it.

- Everywhere (Linux, macOS): a new interpreter with the standard library alone, its own process group, a new
  working folder that is removed afterwards, an empty environment, limits on time, memory, file size and open
  files, bounded output.
- An audit hook (`sys.addaudithook`) refuses writes elsewhere, other programs, sockets, ctypes. It is a fence
  inside Python, not a security boundary: it stops accidents and the usual shortcuts; code that sets out to
  escape can. The same holds for verdicts: they stop every easy cheat, but program and checks share one
  interpreter.
- On Linux, where the kernel lets root or ordinary users make namespaces: no network interface at all, a
  read-only file system except for the folder (which is a small disk in memory), no sight of other processes
  and of the home folder, and all of the program's processes die with the first. Started by root, it becomes a
  user that nobody has. These are the kernel's.

Other files that everyone may read can be read. For code from people who mean harm, run luthier in a container
or a virtual machine without network and secrets.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CELL = str(Path(__file__).with_name("cell.py"))
# bytes kept of each of standard output, standard error and verdicts; the rest is read and dropped
OUTPUT = 64 * 1024
DISK_MB = 64  # what a program may write in all (one file, where there is no disk of its own)
PROCESSES = 32  # processes and threads of one program


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

    A check has passed only where its verdict came after it ran, on a pipe of its own and signed with a number
    drawn for this run: an early exit, a printed "passed" and a redefined builtin pass nothing. After a check
    that does not end, the checks behind it have failed. `packages` lets the code import what is installed
    here.
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
        "other processes hidden (kernel)": walls.get("processes", False),
        "limited number of processes (kernel)": walls.get("counted", False),
        "not root": walls.get("not_root", os.getuid() != 0),
    }


def _run(
    code: str,
    *,
    timeout: float,
    memory_mb: int,
    stdin: str = "",
    checks: Sequence[str] = (),
    packages: bool = False,
    hook: bool = True,
    walls: bool = True,
) -> tuple[Result, dict[str, bool]]:
    """The result, and which walls of the kernel stood. Without `hook` or `walls` each can be tried alone."""
    nonce = secrets.token_hex(16)
    folder = tempfile.mkdtemp(prefix="luthier-")
    job = {
        "code": code,
        "checks": list(checks),
        "nonce": nonce,
        "folder": folder,
        "hook": hook,
        "walls": walls,
        "timeout": timeout,
        "memory_mb": memory_mb,
        "disk_mb": DISK_MB,
        "processes": PROCESSES,
        # who root becomes: a user number no system gives out
        "stranger": 0x40000000 + secrets.randbelow(1 << 29),
    }
    try:
        status, late, out, err, verdicts = _spawn(job, stdin, packages)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = verdicts.decode(errors="replace").split("\n")[:-1]  # behind the last line end is half a line
    stood: dict[str, bool] = {}
    numbers, errors, ended = set(), [], False
    for line in lines:
        if not line.startswith(nonce + " "):
            continue  # the program wrote it
        what, value = json.loads(line[33:])
        if what == "walls":
            stood = stood or value
        elif what == "passed":
            numbers.add(value)
        elif what == "error":
            errors.append(value)
        elif what == "end":
            ended = ended or value is True
    passed = tuple(i in numbers for i in range(len(checks)))
    reason = ""
    if late or status in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        reason = "timeout"
    elif errors:
        reason = errors[0]
    elif not ended:
        if status < 0:
            reason = f"signal {-status}"
        elif 128 < status < 192:  # the keeper's way to hand a signal on
            reason = f"signal {status - 128}"
        else:
            reason = f"exit {status}"
    elif not all(passed):
        reason = "exit 0"
    return (
        Result(not reason, out.decode(errors="replace"), err.decode(errors="replace"), reason, passed),
        stood,
    )


def _spawn(job: dict, stdin: str, packages: bool) -> tuple[int, bool, bytes, bytes, bytes]:
    """Start the cell, read it dry, end it with all it started: (exit status, too late?, stdout, stderr,
    verdicts).
    """
    # hashes are the same in every run, so that a reward is; locale and home are nobody's
    environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    environment |= {"HOME": job["folder"], "TMPDIR": job["folder"]}
    if packages:  # a thread a core is more than the limits on processes and memory let numpy start
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    flags = ["-s", "-B", "-X", "utf8"]
    if not packages:
        flags.append("-S")
    read, write = os.pipe()
    with tempfile.TemporaryFile() as input_file, tempfile.TemporaryFile() as order:
        input_file.write(stdin.encode())
        order.write(json.dumps(job).encode())
        input_file.seek(0)
        order.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, *flags, CELL, str(order.fileno()), str(write)],
                stdin=input_file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                cwd=job["folder"],
                pass_fds=(order.fileno(), write),
                start_new_session=True,
            )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
    pipes = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray(), read: bytearray()}
    late = False
    try:
        with selectors.DefaultSelector() as selector:
            for fd in pipes:
                selector.register(fd, selectors.EVENT_READ)
            deadline = time.monotonic() + job["timeout"]
            while selector.get_map():
                # the first process may be gone while another holds its pipes: look now and then
                events = selector.select(min(0.1, max(0.0, deadline - time.monotonic())))
                for key, _ in events:
                    data = os.read(key.fd, 1 << 16)
                    pipes[key.fd] += data[: OUTPUT - len(pipes[key.fd])]
                    if not data:
                        selector.unregister(key.fd)
                late = time.monotonic() > deadline and process.poll() is None
                if late or (not events and process.poll() is not None):
                    break
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        status = process.wait()
        process.stdout.close()
        process.stderr.close()
        os.close(read)
    out, err, verdicts = (bytes(data) for data in pipes.values())
    return status, late, out, err, verdicts
