"""A cell inside bubblewrap (`bwrap`), for machines that let it make namespaces and ordinary programs not.

The root that it builds is that of `walls.own_root`: Python and the system's libraries, read-only, and an
empty disk in memory. The keeper has no privilege in it: programs of one cell share this disk, a folder each
that is removed behind them, and the filter of system calls refuses them processes of their own.
"""

from __future__ import annotations

import os
import shutil

from . import walls

CODE = "/luthier"  # where the sandbox's own package `cell` lies
DISK_MB = 256
NOBODY = 65534


def command(packages: bool) -> tuple[list[str], list[int]] | None:
    """The words before those of the keeper, and the open files that they name; None without bubblewrap.

    The files are the module `_ctypes`, which the keeper loads from the disk in memory and deletes before any
    program is there to see it.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return None
    words = [bwrap, "--unshare-user", "--unshare-all", "--die-with-parent", "--cap-drop", "ALL"]
    if os.getuid() == 0:
        words += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
    for folder in ("/dev", "/etc", "/home", "/proc", "/root", "/run", "/sys", "/tmp"):
        words += ["--dir", folder]
    for path in walls.python_folders(packages):
        words += binding(path)
    words += ["--ro-bind", os.path.dirname(os.path.realpath(__file__)), f"{CODE}/cell"]
    for path in walls.SETTINGS:
        words += ["--ro-bind-try", path, path]
    for name in walls.DEVICES:
        words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    files = []
    words += ["--size", str(DISK_MB << 20), "--tmpfs", walls.HOME]
    for path in walls.hidden_files():
        name = os.path.basename(path)
        if name.startswith("_ctypes."):
            files.append(os.open(path, os.O_RDONLY))
            words += ["--file", str(files[-1]), f"{walls.HOME}/{name}"]
        words += ["--ro-bind", "/dev/null", path]
    return [*words, "--remount-ro", "/", "--chdir", "/", "--"], files


def binding(path: str) -> list[str]:
    """A file or folder of the machine, read-only, at the same path; links of the top stay links."""
    if os.path.islink(path) and path.count("/") == 1:
        return ["--symlink", os.readlink(path), path]
    return ["--ro-bind", os.path.realpath(path), path]
