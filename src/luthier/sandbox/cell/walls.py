"""The walls of the kernel: a root, processes and a network of one's own; or Landlock where those are refused.

Called by the keeper before anything that is not trusted runs. Errors of the kernel are no exceptions here:
what stands is reported, and the keeper decides.
"""

from __future__ import annotations

import os
import stat
import struct
import sys
from contextlib import suppress

from . import seccomp

# CLONE_NEW...: mounts, System V memory, network, host name, control groups
SPACES = {"files": 0x20000, "ipc": 0x8000000, "network": 0x40000000, "names": 0x4000000, "groups": 0x2000000}
NEWUSER, NEWPID = 0x10000000, 0x20000000
RDONLY, NOSUID, NODEV, BIND, RECURSIVE, PRIVATE = 0x1, 0x2, 0x4, 0x1000, 0x4000, 0x40000
SYSTEM = (
    "/usr/bin",
    "/usr/lib",
    "/usr/lib64",
    "/usr/lib32",
    "/usr/libexec",
    "/bin",
    "/lib",
    "/lib64",
    "/lib32",
)
SETTINGS = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")
DEVICES = ("null", "zero", "full", "random", "urandom")
HOME = "/cell"  # a program's folder, in its own root
CODE = "/luthier/cell"  # where this package lies there
# parts of Python that leave Python; nothing of a program's own needs them
HIDDEN = (
    "_ctypes",
    "_testcapi",
    "_testinternalcapi",
    "_testmultiphase",
    "_xxsubinterpreters",
    "_posixsubprocess",
    "_interpreters",
)


def library():
    """The C library, or None on a system whose kernel has no walls that are known here."""
    if sys.platform != "linux":
        return None
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def write(path: str, text: str) -> None:
    """A file of /proc that has to be there but may refuse."""
    with suppress(OSError), open(path, "w") as file:
        file.write(text)


# ------------------------------------------------------------------------------------------ a root of its own


def leave(libc) -> bool:
    """Leave the machine's mounts, network and shared memory: as root directly, else in a user space of one's
    own. False where the kernel refuses.
    """
    flags = sum(SPACES.values())
    if libc.unshare(flags) == 0:
        return True
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(NEWUSER) != 0:
        return False
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{uid} {uid} 1")
    write("/proc/self/gid_map", f"{gid} {gid} 1")
    return libc.unshare(flags) == 0


def own_root(libc, place: str, packages: bool) -> str:
    """Go and live in a new root: Python and the system's libraries, read-only; everything else is not there.

    `place` is an empty folder. Returns what went wrong, or ''.
    """
    if libc.mount(b"none", b"/", None, PRIVATE | RECURSIVE, None) != 0:
        return "mounts cannot be made private"
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", NOSUID, b"size=1m,mode=755") != 0:
        return "no disk in memory"
    for folder in ("dev", "dev/shm", "etc", "home", "proc", "root", "run", "sys", "tmp", HOME[1:], ".old"):
        os.makedirs(place + "/" + folder)
    for path in python_folders(packages):
        if not show(libc, place, path, path):
            return f"{path} cannot be mounted"
    copy_code(place + CODE)
    for path in SETTINGS:
        if os.path.exists(path):
            show(libc, place, os.path.realpath(path), path)
    for name in DEVICES:
        show(libc, place, f"/dev/{name}", f"/dev/{name}")
    hide_modules(libc, place)
    os.chdir(place)
    pivot_root = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine, 155)
    if libc.syscall(pivot_root, b".", b".old") != 0:
        return "no new root"
    os.chdir("/")
    if libc.umount2(b"/.old", 2) != 0:  # MNT_DETACH
        return "the old root stays"
    os.rmdir("/.old")
    attributes = struct.pack("=4Q", RDONLY | NOSUID, 0, 0, 0)
    mount_setattr, here_fd = 442, -100
    if libc.syscall(mount_setattr, here_fd, b"/", 0x8000, attributes, len(attributes)) != 0:
        return "mounts cannot be made read-only"
    return ""


def python_folders(packages: bool) -> list[str]:
    """Folders that a Python of this installation reads, a folder before what lies in it."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix, os.path.realpath(sys.base_prefix)}
    if packages:
        prefixes |= {sys.prefix, sys.exec_prefix, os.path.realpath(sys.prefix)}
    paths: set[str] = set(SYSTEM)
    for prefix in prefixes:
        paths |= {os.path.join(prefix, part) for part in ("bin", "lib", "lib64", "pyvenv.cfg")}
    for executable in (sys.executable, os.path.realpath(sys.executable)):
        paths.add(os.path.dirname(executable))
        if not packages:
            paths.add(os.path.join(os.path.dirname(os.path.dirname(executable)), "pyvenv.cfg"))
    paths |= {p for p in sys.path if packages and os.path.isdir(p)}
    if os.path.realpath(sys.executable).startswith("/nix/"):
        paths.add("/nix/store")
    chosen: list[str] = []
    for path in sorted(paths):
        below = any(path.startswith(other + "/") and not os.path.islink(other) for other in chosen)
        if os.path.exists(path) and path != "/" and not below:
            chosen.append(path)
    return chosen


def show(libc, place: str, source: str, path: str) -> bool:
    """A file or folder of the machine at a path of the new root; links of the top stay links."""
    target = place + path
    if os.path.lexists(target):
        return True
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source) and source.count("/") == 1:
        os.symlink(os.readlink(source), target)
        return True
    source = os.path.realpath(source)
    if os.path.isdir(source):
        os.makedirs(target)
    else:
        with open(target, "w"):
            pass
    return libc.mount(os.fsencode(source), os.fsencode(target), None, BIND | RECURSIVE, None) == 0


def copy_code(folder: str) -> None:
    """This package in the new root, compiled once for all programs."""
    import py_compile
    import shutil

    os.makedirs(folder)
    here = os.path.dirname(os.path.realpath(__file__))
    for name in sorted(os.listdir(here)):
        if name.endswith(".py"):
            shutil.copyfile(f"{here}/{name}", f"{folder}/{name}")
            py_compile.compile(f"{folder}/{name}", dfile=f"{CODE}/{name}")


def hide_modules(libc, place: str) -> None:
    """Python's doors to C are empty files in the new root."""
    for path in hidden_files():
        libc.mount(b"/dev/null", os.fsencode(place + path), None, BIND, None)


def hidden_files() -> list[str]:
    """Where Python's doors to C lie."""
    import sysconfig

    folder = sysconfig.get_config_var("DESTSHARED") or os.path.join(
        sysconfig.get_path("stdlib"), "lib-dynload"
    )
    if not os.path.isdir(folder):
        return []
    return [f"{folder}/{name}" for name in os.listdir(folder) if name.partition(".")[0] in HIDDEN]


def fresh_disk(libc, disk_mb: int, files: int, uid: int) -> bool:
    """An empty disk in memory as the program's folder, in place of the one of the program before."""
    libc.umount2(HOME.encode(), 2)
    options = f"size={disk_mb}m,nr_inodes={files},mode=700,uid={uid},gid={uid}"
    if uid == os.getuid():
        options = f"size={disk_mb}m,nr_inodes={files},mode=700"
    return libc.mount(b"tmpfs", HOME.encode(), b"tmpfs", NOSUID | NODEV, options.encode()) == 0


# --------------------------------------------------------------------------------------------------- Landlock


def landlock_version(libc) -> int:
    """Which Landlock the kernel has; 0 for none."""
    return max(0, libc.syscall(444, None, 0, 1)) if libc is not None else 0


def landlock(libc, folder: str, packages: bool) -> bool:
    """Files are readable where Python lies, changeable in the folder alone. Needs no_new_privs."""
    version = landlock_version(libc)
    if not version:
        return False
    rights = (1 << 13) - 1  # of the first version; then refer, truncate, ioctl on devices
    for bit, since in ((13, 2), (14, 3), (15, 5)):
        rights |= (1 << bit) * (version >= since)
    network, scope = 3 * (version >= 4), 3 * (version >= 6)
    attributes = struct.pack("=3Q", rights, network, scope)
    size = 8 + 8 * (version >= 4) + 8 * (version >= 6)
    ruleset = libc.syscall(444, attributes, size, 0)
    if ruleset < 0:
        return False
    here = os.path.dirname(os.path.realpath(__file__))
    readable = [*python_folders(packages), *SETTINGS, os.path.dirname(here)]
    allowed = dict.fromkeys(readable, 0x1 | 0x4 | 0x8)  # execute, read files, read folders
    allowed |= dict.fromkeys((f"/dev/{name}" for name in DEVICES), 0x2 | 0x4)
    allowed[folder] = rights & ~0x1
    for path, what in allowed.items():
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            what &= 0x1 | 0x2 | 0x4 | (1 << 14) | (1 << 15)
        libc.syscall(445, ruleset, 1, struct.pack("=Qi", what & rights, fd), 0)
        os.close(fd)
    done = libc.syscall(446, ruleset, 0) == 0
    os.close(ruleset)
    return done


# --------------------------------------------------------------------------------------------------- the user


def readable_by_all(path: str, top: str) -> bool:
    """Could a stranger import Python's own library? Folders above `top` do not count."""
    while path != os.path.dirname(path) and len(path) >= len(top):
        mode = os.stat(path).st_mode
        needed = stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH
        if not mode & needed:
            return False
        path = os.path.dirname(path)
    return True


def become(libc, uid: int) -> None:
    """Turn into a user that nobody else is (0: stay), and give up every privilege for good."""
    if uid:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    header = struct.pack("=Ii", 0x20080522, 0)
    libc.capset(header, bytes(24))  # what made the walls could also take them down
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no way back through a setuid program
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: no program outlives its keeper


def filtered(libc, spaces: bool) -> bool:
    """Put the filter of system calls over this process."""
    return libc is not None and seccomp.install(libc, spaces, os.getpid())
