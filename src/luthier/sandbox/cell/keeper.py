"""The first process of a cell: builds walls once, then starts a program inside them for each order it gets.

Orders come over a socket, each with the files that the program's process gets as its own. A program starts in
a fresh interpreter, as the first process of a new space of processes, on an empty disk, as a user nobody is.
A judge of checks, whose code is not the model's, is a copy of this process inside the same walls. The keeper
itself runs neither's code.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress

from . import judge, walls

FIRST = 3  # numbers of the files behind input, output and errors
ROOT_MODE, BUBBLEWRAP_MODE, FILTER_MODE, NO_MODE = "root", "bubblewrap", "filter", "none"


def main(descriptor: int, mode: str, place: str, packages: bool) -> None:
    """Answer orders until the socket ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = socket.socket(fileno=descriptor)
    if mode == BUBBLEWRAP_MODE:
        load_ctypes(walls.HOME)
    keeper = Keeper(line, mode, packages)
    problem = keeper.build(place)
    line.sendall(json.dumps({"walls": keeper.standing, "problem": problem}).encode())
    if problem:
        return
    gc.freeze()  # a process made from this one does not copy its memory to count it
    while True:
        data, files, _, _ = socket.recv_fds(line, 1 << 16, 16)
        if not data:
            return
        order = json.loads(data)
        status, late, stood = keeper.carry_out(order, files)
        answer = {"status": status, "late": late, "walls": stood}
        with suppress(OSError):
            line.sendall(json.dumps(answer).encode())


class Keeper:
    """A cell's walls, and what is started inside them."""

    def __init__(self, line: socket.socket, mode: str, packages: bool):
        self.line, self.mode, self.packages = line, mode, packages
        self.libc = walls.library() if mode != NO_MODE else None
        self.standing: dict[str, bool] = {}

    def build(self, place: str) -> str:
        """The walls that all programs of this cell share. Returns what went wrong, or ''."""
        if self.mode == NO_MODE:
            return ""
        if self.libc is None:
            return "no walls of the kernel on this system"
        if self.mode == FILTER_MODE:
            return self.try_filter()
        if self.mode == BUBBLEWRAP_MODE:  # the root stands already; the filter keeps programs to themselves
            return self.try_filter(landlock=False)
        if not walls.leave(self.libc):
            return "the kernel refuses new spaces (unshare)"
        return walls.own_root(self.libc, place, self.packages)

    def try_filter(self, landlock: bool = True) -> str:
        """Does the kernel take the filter, or Landlock where that is enough? Tried in a process of its own,
        since both stay.
        """
        pid = os.fork()
        if pid == 0:
            works = False
            with suppress(BaseException):
                walls.become(self.libc, 0)
                landlock = landlock and walls.landlock(self.libc, "/", self.packages)
                works = walls.filtered(self.libc, False) or landlock
            os._exit(0 if works else 1)
        if os.waitpid(pid, 0)[1]:
            return "the kernel has neither seccomp filters nor Landlock"
        return ""

    def carry_out(self, order: dict, files: list[int]) -> tuple[int, bool, dict[str, bool]]:
        """Run one order to its end: (exit status, did it take too long?, walls that stood)."""
        own_root = self.mode == ROOT_MODE
        uid = self.stranger(order)
        if own_root:
            walls.fresh_disk(self.libc, order["disk_mb"], order["files"], uid or os.getuid())
            order["folder"] = walls.HOME
        elif self.mode == BUBBLEWRAP_MODE:
            order["folder"] = tempfile.mkdtemp(dir=walls.HOME)
        elif uid:
            with suppress(OSError):
                os.chown(order["folder"], uid, uid)
        reading, report = os.pipe()
        keeper = os.fork()
        if keeper == 0:
            self.line.close()
            os.close(reading)
            self.watch_over(order, files, uid, report)
        os.close(report)
        for file in files:
            os.close(file)
        status = self.wait(keeper, order["timeout"] + order["grace"])
        stood = read_report(reading)
        os.close(reading)
        with suppress(OSError):
            os.killpg(keeper, signal.SIGKILL)
        if own_root:  # frees its memory, and refuses the disk to the next one
            self.libc.umount2(walls.HOME.encode(), 2)
        if self.mode == BUBBLEWRAP_MODE:
            shutil.rmtree(order["folder"], ignore_errors=True)
        late = stood.pop("late", False)
        return status, late, stood

    def stranger(self, order: dict) -> int:
        """Who root becomes; 0 where this process is not root or Python belongs to root alone."""
        if os.getuid() != 0 or self.mode == NO_MODE and order["hook"] is None:
            return 0
        top = sys.base_prefix if self.mode == ROOT_MODE else "/"
        try:
            readable = walls.readable_by_all(os.path.realpath(os.__file__), os.path.realpath(top))
        except OSError:
            readable = False
        return order["stranger"] if readable and self.libc is not None else 0

    def wait(self, pid: int, seconds: float) -> int:
        """A process's exit status; it is killed when late or when nobody waits for its answer any more."""
        deadline = time.monotonic() + seconds
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            left = deadline - time.monotonic()
            if left <= 0 or self.abandoned():
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            watch(pid, left, self.line)

    def abandoned(self) -> bool:
        """Has the other end of the socket gone?"""
        with suppress(BlockingIOError):
            return not self.line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return False

    def watch_over(self, order: dict, files: list[int], uid: int, report: int) -> None:
        """In a process of its own: start the program, end it when its time is over, hand its status on."""
        status = 125
        try:
            os.setsid()
            stood = {"processes": False}
            if self.mode == ROOT_MODE:
                stood["processes"] = self.libc.unshare(walls.NEWPID) == 0
            pid = os.fork()
            if pid == 0:
                self.enter(order, files, uid, report, stood)
            for file in files:
                os.close(file)
            if self.libc is not None:
                self.libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: the program ends with its keeper
            status = self.end_in_time(pid, order["timeout"], report)
        finally:
            os._exit(status)

    def end_in_time(self, pid: int, seconds: float, report: int) -> int:
        """Wait for the program; 128 + the number of a signal that ended it."""
        deadline = time.monotonic() + seconds
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            left = deadline - time.monotonic()
            if not ended and left <= 0:
                os.write(report, b'{"late": true}\n')
                os.kill(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, 0)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            watch(pid, left)

    def enter(self, order: dict, files: list[int], uid: int, report: int, stood: dict[str, bool]) -> None:
        """Become the program: its files, its limits, its user, the filter, and a fresh interpreter."""
        try:
            # inherited numbers move out of the way first
            moved = [os.dup(file) for file in (*files, report)]
            moved = [move_up(file) for file in moved]
            for number, file in enumerate(moved):
                os.dup2(file, number, inheritable=True)
            first_free = len(moved)
            os.closerange(first_free, 4096)
            report = first_free - 1
            os.chdir(order["folder"])
            limits(order, counted=self.mode == ROOT_MODE or bool(uid))
            self.shut(order, uid, stood)
            os.write(report, json.dumps(stood).encode() + b"\n")
            os.close(report)
            numbers = [str(FIRST + i) for i in range(len(files) - FIRST)]
            if order["kind"] == "judge":
                judge.main(*map(int, numbers))
                os._exit(0)
            self.start(order, numbers)
        except BaseException as error:
            with suppress(BaseException):
                os.write(2, f"the sandbox cannot start a program: {error!r}\n".encode())
        finally:
            os._exit(125)

    def shut(self, order: dict, uid: int, stood: dict[str, bool]) -> None:
        """The walls of one program."""
        own_root = self.mode in (ROOT_MODE, BUBBLEWRAP_MODE)
        for name in ("network", "ipc", "own_root", "read_only"):
            stood[name] = own_root
        stood["counted"] = self.mode == ROOT_MODE or bool(uid)
        if self.libc is None:
            stood |= {"filter": False, "landlock": False, "not_root": os.getuid() != 0}
            return
        walls.become(self.libc, uid)
        stood["not_root"] = os.getuid() != 0
        stood["landlock"] = False
        if self.mode != ROOT_MODE:
            stood["landlock"] = walls.landlock(self.libc, order["folder"], self.packages)
        stood["filter"] = walls.filtered(self.libc, stood["processes"])
        stood["network"] = own_root or stood["filter"]
        stood["read_only"] = own_root or stood["landlock"]

    def start(self, order: dict, numbers: list[str]) -> None:
        """A fresh interpreter in place of this process."""
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        if self.mode in (ROOT_MODE, BUBBLEWRAP_MODE):
            here = os.path.dirname(walls.CODE)
        # hashes are the same in every run, so that a reward is; locale and home are nobody's
        environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
        environment |= {"HOME": order["folder"], "TMPDIR": order["folder"]}
        flags = ["-s", "-B", "-X", "utf8"]
        if self.packages:  # a thread a core is more than the limits on processes and memory let numpy start
            threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
            environment |= dict.fromkeys(threads, "1")
        else:
            flags.append("-S")
        begin = (
            f"import sys; sys.path[0] = {here!r}; from cell import program; del sys.path[0]; program.main()"
        )
        arguments = [sys.executable, *flags, "-c", begin, *numbers]
        os.execve(sys.executable, arguments, environment)


def load_ctypes(folder: str) -> None:
    """The module that lies in a folder for this process alone, which is deleted then."""
    sys.path.insert(0, folder)
    walls.library()
    del sys.path[0]
    for name in os.listdir(folder):
        os.unlink(f"{folder}/{name}")


def watch(pid: int, seconds: float, line: socket.socket | None = None) -> None:
    """Sleep until a process ends, the socket says something or ends, or the seconds are over."""
    waiting = [] if line is None else [line.fileno()]
    if not hasattr(os, "pidfd_open"):
        time.sleep(min(seconds, 0.003))
        return
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        time.sleep(min(seconds, 0.003))
        return
    try:
        select.select([descriptor, *waiting], [], [], max(0.0, min(seconds, 60.0)))
    finally:
        os.close(descriptor)


def move_up(file: int) -> int:
    """The same file under a number that no program's file has."""
    import fcntl

    return fcntl.fcntl(file, fcntl.F_DUPFD, 64)


def read_report(descriptor: int) -> dict[str, bool]:
    """What a program's process reported about its walls before the program began."""
    os.set_blocking(descriptor, False)
    stood: dict[str, bool] = {}
    with suppress(BlockingIOError):
        for line in os.read(descriptor, 1 << 16).splitlines():
            stood |= json.loads(line)
    return stood


def limits(order: dict, counted: bool) -> None:
    """Limits of the kernel; soft = hard, so that the program cannot raise them."""
    maxima = {
        "CPU": int(order["timeout"]) + 2,
        "AS": order["memory_mb"] << 20,
        "FSIZE": order["disk_mb"] << 20,
        "CORE": 0,
        "NOFILE": 64,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    if counted:  # the count is per user (or user space): elsewhere it would count the user's other programs
        maxima["NPROC"] = order["processes"]
    for name, value in maxima.items():
        what = getattr(resource, f"RLIMIT_{name}", None)
        if what is None:
            continue
        hard = resource.getrlimit(what)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        with suppress(OSError, ValueError):  # macOS refuses some
            resource.setrlimit(what, (value, value))
