"""What runs in the sandbox: builds its own walls, runs a program and checks. Started by _sandbox, never
imported.

A fresh interpreter starts this file, so that nothing is done between fork and exec of a process full of
threads.
"""

import sys

sys.path.pop(0)  # this file's folder: its math.py must not hide Python's own

import ast  # noqa: E402
import builtins  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import stat  # noqa: E402
import types  # noqa: E402
from functools import partial  # noqa: E402

PROGRAM = "<program>"
# CLONE_NEW...
SPACES = {"files": 0x00020000, "ipc": 0x08000000, "network": 0x40000000, "processes": 0x20000000}
NEWUSER = 0x10000000
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


# ---------------------------------------------------------------------------------------- walls of the kernel


def spaces_of_its_own(folder: str, disk_mb: int, number: int) -> dict[str, bool]:
    """Leave the machine's network, processes and writable files, as far as the kernel allows; say how far
    that was.
    """
    walls = dict.fromkeys((*SPACES, "read_only", "counted", "not_root"), False)
    if sys.platform != "linux":
        return walls
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def unshare() -> None:
        for name, flag in SPACES.items():
            walls[name] = walls[name] or libc.unshare(flag) == 0

    unshare()  # root may, as it is
    stranger = 0
    if not walls["files"]:
        stranger = become_nobody(folder, number, libc)
        uid, gid = os.getuid(), os.getgid()
        if libc.unshare(NEWUSER) == 0:
            walls["counted"] = True
            write("/proc/self/setgroups", "deny")
            write("/proc/self/uid_map", f"{uid} {uid} 1")
            write("/proc/self/gid_map", f"{gid} {gid} 1")
            unshare()
    if walls["files"]:
        walls["read_only"] = read_only(folder, disk_mb, libc)
    if walls["processes"]:
        leave_a_keeper(libc)
    stranger = stranger or become_nobody(folder, number, libc)
    # processes can be limited: nobody else's are counted
    walls["counted"] = walls["counted"] or bool(stranger)
    walls["not_root"] = os.getuid() != 0
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capset(header, nothing)  # what made the walls could also take them down
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no way back through a setuid program
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: no sandbox outlives who asked for it
    for name in [m for m in sys.modules if m.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]
    return walls


def write(path: str, text: str) -> None:
    """A file of /proc that has to be there but may refuse."""
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        pass


def become_nobody(folder: str, uid: int, libc) -> int:
    """As root: turn into a user that nobody else is, so that files, signals and the process limit are a
    stranger's.
    """
    if os.getuid() != 0 or not readable_by_all(os.__file__):
        return 0
    try:
        os.chown(folder, uid, uid)
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    except OSError:
        return 0
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else /proc/self/uid_map stays root's
    return uid


def readable_by_all(path: str) -> bool:
    """Could a stranger import Python's own library?"""
    parents = [path]
    while parents[-1] != os.path.dirname(parents[-1]):
        parents.append(os.path.dirname(parents[-1]))
    return all(os.stat(p).st_mode & (stat.S_IXOTH if i else stat.S_IROTH) for i, p in enumerate(parents))


def read_only(folder: str, disk_mb: int, libc) -> bool:
    """All that is mounted becomes read-only, the folder a small disk in memory; home and processes out of
    sight.
    """
    import ctypes

    flags = 0x2 | 0x4  # MS_NOSUID | MS_NODEV
    # MS_PRIVATE | MS_REC: what follows stays in here
    if libc.mount(b"none", b"/", None, 0x40000 | 0x4000, None) != 0:
        return False
    hide_home(folder, libc)
    attributes = (ctypes.c_uint64 * 4)(0x1, 0, 0, 0)  # MOUNT_ATTR_RDONLY
    mount_setattr, recursive = 442, 0x8000  # one number on every processor
    if libc.syscall(mount_setattr, -100, b"/", recursive, attributes, ctypes.sizeof(attributes)) != 0:
        return False
    # anyone may write to the top of the disk: its one user gets a name only later
    options = f"size={disk_mb}m,nr_inodes=10k,mode=1777".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options) != 0:
        return False
    libc.mount(b"tmpfs", b"/proc", b"tmpfs", flags | 0x1, b"size=4k")
    os.chdir(folder)
    return True


def hide_home(folder: str, libc) -> None:
    """An empty disk over the user's home, with Python alone put back where it was, in case it lives there."""
    import pwd

    try:
        home = os.path.realpath(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        home = "/root"
    if home == "/" or not os.path.isdir(home) or (os.path.realpath(folder) + "/").startswith(home + "/"):
        return
    installs = {os.path.realpath(p) for p in (sys.base_prefix, sys.prefix)}
    visible: list[str] = []
    for path in sorted(installs):  # a folder comes before what lies in it
        if path.startswith(home + "/") and not any(path.startswith(p + "/") for p in visible):
            visible.append(path)
    for number, path in enumerate(visible):
        aside = f"{folder}/{number}"
        os.mkdir(aside)
        # MS_BIND | MS_REC
        if libc.mount(os.fsencode(path), os.fsencode(aside), None, 0x1000 | 0x4000, None) != 0:
            return
    if libc.mount(b"tmpfs", os.fsencode(home), b"tmpfs", 0x2 | 0x4, b"size=64k,mode=755") != 0:
        return
    for number, path in enumerate(visible):
        aside = f"{folder}/{number}"
        os.makedirs(path)
        libc.mount(os.fsencode(aside), os.fsencode(path), None, 0x2000, None)  # MS_MOVE


def leave_a_keeper(libc) -> None:
    """Go on as the first process of a new space: when it ends, the kernel ends all others in there."""
    pid = os.fork()
    if pid == 0:
        return
    libc.prctl(1, 9, 0, 0, 0)
    status = os.waitpid(pid, 0)[1]
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def limits(job: dict, alone: bool) -> None:
    """Limits of the kernel; soft = hard, so that the program cannot raise them."""
    seconds = int(job["timeout"]) + 2
    maxima = {
        "CPU": seconds,
        "AS": job["memory_mb"] << 20,
        "FSIZE": job["disk_mb"] << 20,
        "CORE": 0,
        "NOFILE": 64,
    }
    if alone:  # the count is per user (or user space): elsewhere it would count the user's other programs
        maxima["NPROC"] = job["processes"]
    for name, value in maxima.items():
        what = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(what)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        try:
            resource.setrlimit(what, (value, value))
        except (OSError, ValueError):  # macOS refuses some
            pass


# --------------------------------------------------------------------------------------------- the audit hook


def watch(folder: str) -> None:
    """Refuse, inside Python, what a program for a test has no business doing."""
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
            if args[0] in ("ctypes", "_ctypes", "_posixsubprocess"):
                raise ImportError(f"the sandbox has no {args[0]}")
        # asyncio wants a pair of local sockets; connect and bind stay refused
        elif event == "socket.__new__":
            if args[1] != 1:
                raise PermissionError(1, "the sandbox has no network")
        elif event.startswith(CHANGING):
            if not all(inside(a) for a in args if isinstance(a, (str, bytes)) and a != ":memory:"):
                raise PermissionError(1, f"the sandbox allows changes only in its own folder: {event}")
        elif event.startswith(REACHING_OUT):
            raise PermissionError(1, f"the sandbox does not allow {event}")

    try:  # starts programs without an audit event; imported now, since subprocess and asyncio import it
        import _posixsubprocess

        _posixsubprocess.fork_exec = lambda *args: hook("subprocess.Popen", args)
    except ImportError:
        pass
    sys.addaudithook(hook)


# ----------------------------------------------------------------------------------------- program and checks


def sender(fd: int, nonce: str):
    """How verdicts leave: signed with a number the program does not know."""
    send = os.write

    def say(what: str, value: object) -> None:
        line = f"{nonce} {json.dumps([what, value])}\n".encode()
        while line:
            line = line[send(fd, line) :]

    return say


def same(left: object, right: object) -> bool:
    """left == right, except that an `__eq__` in the program decides only between objects of the program's own
    types.
    """
    for one, other in ((left, right), (right, left)):
        if forged(one, 0) and not forged(other, 0):
            return False
    return left == right


def forged(value: object, depth: int) -> bool:
    """Does an `__eq__` that the program wrote have a say in comparing this?"""
    if isinstance(value, (list, tuple, set, frozenset)) and depth < 4:
        return own_eq(type(value)) or any(forged(v, depth + 1) for v in tuple(value)[:1000])
    if isinstance(value, dict) and depth < 4:
        return own_eq(type(value)) or any(forged(v, depth + 1) for v in tuple(value.values())[:1000])
    return own_eq(type(value))


def own_eq(kind: type) -> bool:
    """Was the `__eq__` of a type written in the program?"""
    eq = next(
        (vars(k)["__eq__"] for k in type.__dict__["__mro__"].__get__(kind) if "__eq__" in vars(k)), None
    )
    return isinstance(eq, types.FunctionType) and eq.__code__.co_filename == PROGRAM


class Comparisons(ast.NodeTransformer):
    """`a == b` in a check becomes `same(a, b)`."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """Chains (a == b == c) stay as they are."""
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], ast.Eq):
            return node
        function = ast.copy_location(ast.Name("__same__", ast.Load()), node)
        return ast.copy_location(ast.Call(function, [node.left, node.comparators[0]], []), node)


def attempt(say, label: str, work) -> bool:
    """Run a piece; tell what went wrong, SystemExit included."""
    try:
        work()
        return True
    except SystemExit as error:
        if label == "program" and not error.code:
            return True
        say("error", f"exit {error.code or 0}")
    except MemoryError:
        say("error", "memory")
    except BaseException as error:  # KeyboardInterrupt raised by the program is its own
        try:
            say("error", f"{type(error).__name__}: {str(error)[:300]}".rstrip(": "))
        except Exception:  # a __str__ of the program's own
            say("error", type(error).__name__)
        if label == "program":
            explain(error)
    return False


def explain(error: BaseException) -> None:
    """The traceback on standard error, from the program's own frames on, unless memory is gone."""
    try:
        import traceback

        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != PROGRAM:
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames)
    except BaseException:
        pass


def main(job_fd: int, verdict_fd: int) -> None:
    """Walls, program, checks, and out, whatever threads the program left behind."""
    with open(job_fd, "rb") as file:
        job = json.loads(file.read())
    folder, checks, leave, flush = job["folder"], job["checks"], os._exit, sys.stdout.flush
    os.chdir(folder)
    walls = spaces_of_its_own(folder, job["disk_mb"], job["stranger"]) if job["walls"] else {}
    limits(job, walls.get("counted", False))
    say = sender(verdict_fd, job.pop("nonce"))
    say("walls", walls)
    if job["hook"]:
        watch(folder)
    module = types.ModuleType("__main__")
    # with checks the program is a library: what it does when started as a script (read input, exit) is not
    # asked for
    module.__name__ = "__program__" if checks else "__main__"
    module.__builtins__ = builtins
    sys.modules["__main__"] = sys.modules[module.__name__] = module
    sys.argv = [PROGRAM]
    # taken or done before the program can change them
    common, names, write_json = vars(builtins), vars(module), json.dumps
    originals = dict(common)
    trees = [ast.fix_missing_locations(Comparisons().visit(ast.parse(check))) for check in checks]
    compiled = [compile(tree, "<check>", "exec") for tree in trees]
    finished = []

    def program() -> None:
        exec(compile(job["code"], PROGRAM, "exec", dont_inherit=True), names)
        finished.append(True)

    ok = attempt(say, "program", program)
    common.update(originals)  # a program that redefined len or sorted fools nobody but itself
    json.dumps = write_json
    for number, check in enumerate(compiled if finished else ()):
        names["__same__"] = same
        if attempt(say, "check", partial(exec, check, names)):
            say("passed", number)
    say("end", ok)
    try:
        flush()
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        pass
    leave(0 if ok else 1)


main(int(sys.argv[1]), int(sys.argv[2]))
