"""The audit hook: refuses, inside Python, what a program for a test has no business doing.

A fence, not a wall: it stops accidents and the usual shortcuts with a clear error; the kernel's walls stand
behind it.
"""

from __future__ import annotations

import os
import sys

REACHING_OUT = (  # audit events of starting programs, talking to others, and leaving Python
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.kill",
    "os.killpg",
    "subprocess.",
    "pty.",
    "signal.pthread_kill",
    "socket.",
    "ctypes.",
    "resource.",
    "syslog.",
    "webbrowser.",
    "sqlite3.enable_load",
    "sqlite3.load_ext",
    "gc.",
    "sys._current_frames",
    "sys.settrace",
    "sys.setprofile",
    "sys.unraisablehook",
    "cpython._PySys_ClearAuditHooks",
    "cpython.PyInterpreterState_New",
)
CHANGING = (  # audit events whose text arguments are paths about to change
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
    "os.setxattr",
    "os.removexattr",
    "os.chflags",
    "sqlite3.connect",
)
LEAVING = (  # modules that are doors out of Python, or into interpreters that have no hook
    "ctypes",
    "_ctypes",
    "_ctypes_test",
    "_posixsubprocess",
    "_xxsubinterpreters",
    "_interpreters",
    "_xxinterpchannels",
    "_testcapi",
    "_testinternalcapi",
    "_testmultiphase",
    "_testlimitedcapi",
    "_testbuffer",
)


def watch(folder: str) -> None:
    """Put up the hook; a program may write in its folder only."""
    realpath, fsdecode = os.path.realpath, os.fsdecode
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    folder = realpath(folder)

    def inside(path: int | str | bytes | os.PathLike) -> bool:
        if isinstance(path, int):
            return True
        path = realpath(fsdecode(path))
        return path == folder or path.startswith(folder + "/") or path == "/dev/null"

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            if isinstance(mode, str):
                changes = any(c in mode for c in "wax+")
            else:
                changes = bool((flags or 0) & writing)
            if changes and not inside(path):
                raise PermissionError(1, "the sandbox allows writing only in its own folder", str(path))
            if not isinstance(path, int) and realpath(fsdecode(path)).startswith("/proc"):
                raise PermissionError(1, "the sandbox hides other processes", str(path))
        elif event == "import":
            names = [str(args[0]).rpartition(".")[2], str(args[0])]
            if isinstance(args[1], str):  # a library, whatever name it is loaded under
                names.append(args[1].rpartition("/")[2].partition(".")[0])
            for name in names:
                if name in LEAVING:
                    raise ImportError(f"the sandbox has no {name}")
        # asyncio wants a pair of local sockets; connect and bind stay refused
        elif event == "socket.__new__":
            if args[1] != 1:
                raise PermissionError(1, "the sandbox has no network")
        elif event.startswith(CHANGING):
            if not all(inside(a) for a in args if isinstance(a, (str, bytes)) and a != ":memory:"):
                raise PermissionError(1, f"the sandbox allows changes only in its own folder: {event}")
        elif event.startswith(REACHING_OUT):
            raise PermissionError(1, f"the sandbox does not allow {event}")

    # starts programs without an audit event; subprocess and asyncio import it
    starter = type(sys)("_posixsubprocess")
    starter.fork_exec = lambda *args: hook("subprocess.Popen", args)  # type: ignore[attr-defined]
    sys.modules["_posixsubprocess"] = starter
    sys.addaudithook(hook)
