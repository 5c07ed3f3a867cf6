"""Nobody gets out of the sandbox: as root and as an ordinary user, with the audit hook and without it, behind
a root of its own and behind the filter with Landlock alone.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from helpers.programs import programs
from luthier.sandbox.pool import BUBBLEWRAP_MODE, FILTER_MODE, ROOT_MODE, Cell, CellError
from luthier.sandbox.sandbox import _run

WAYS = programs("ways_out")
# what Landlock does not cover, and is no way out: names and sizes of files, and Python's own test modules
VISIBLE = {"stat a user's file", "up from the folder", "open file descriptors"}
# without the hook the root of its own refuses what lies behind these, not the call itself
HARMLESS = {"trace function", "sqlite library", "test helpers", "internal test helpers"}
NOBODY = 65534


def slow(mode: str):
    """One of the weaker walls, which are tried by `make test-all`."""
    return pytest.param(mode, marks=pytest.mark.slow)


def stands(mode: str) -> bool:
    try:
        Cell(mode, False).close()
    except CellError:
        return False
    return True


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A secret file, a socket with a path, and a port of this machine, and what a program is told of them."""
    folder = tmp_path_factory.mktemp("out")
    secret = folder / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    local, port = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), socket.create_server(("127.0.0.1", 0))
    local.bind(str(folder / "socket"))
    (folder / "socket").chmod(0o777)
    names = {"SECRET": str(secret), "SOCKET": str(folder / "socket"), "PID": os.getpid()}
    names["PORT"] = port.getsockname()[1]
    names["PYTHON"] = [sys.prefix, sys.base_prefix, *sys.path]  # folders on the way to Python are seen
    yield names
    local.close()
    port.close()


def attempts(names: dict, mode: str, hook: bool, ways: dict[str, str] = WAYS) -> list[str]:
    """The ways that led out."""
    escaped = []
    for name, code in ways.items():
        head = "".join(f"{key} = {value!r}\n" for key, value in names.items()) + "escaped = False\n"
        tail = "\nif escaped:\n    print('ESCAPED')"
        result = _run(head + code + tail, timeout=10, memory_mb=256, hook=hook, walls=mode)[0]
        if "ESCAPED" in result.stdout or "secret" in result.stdout:
            escaped.append(name)
    return escaped


@pytest.mark.parametrize("mode", [ROOT_MODE, slow(BUBBLEWRAP_MODE), slow(FILTER_MODE)])
@pytest.mark.parametrize("hook", [True, False], ids=["hook", "kernel alone"])
def test_no_way_out(outside, mode, hook):
    if not stands(mode):
        pytest.skip("this machine's kernel gives no such walls")
    expected = set() if hook else set(HARMLESS)
    if mode == FILTER_MODE:
        expected |= VISIBLE
        if not hook:  # without a root of its own Python's modules can be loaded; the filter holds them in
            expected |= {name for name in WAYS if "ctypes" in name or "interpreter" in name}
            expected |= {"priority of the tests", "limits of the tests", "home", "tmp", "run", "system"}
    assert set(attempts(outside, mode, hook)) <= expected
    assert os.path.exists(outside["SECRET"]) and len(os.listdir(os.path.dirname(outside["SECRET"]))) == 2


AS_NOBODY = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
place = sys.base_prefix
if os.getuid() == 0:
    # Python may lie in root's home: a home that everyone may pass, in a space of mounts of this process
    assert libc.unshare(0x20000) == 0
    assert libc.mount(b"none", b"/", None, 0x44000, None) == 0
    if place.startswith("/root/"):
        os.makedirs("/tmp/luthier-python", exist_ok=True)
        assert libc.mount(place.encode(), b"/tmp/luthier-python", None, 0x5000, None) == 0
        assert libc.mount(b"tmpfs", b"/root", b"tmpfs", 0, b"mode=755") == 0
        os.makedirs(place)
        assert libc.mount(b"/tmp/luthier-python", place.encode(), None, 0x2000, None) == 0
    names = json.loads(sys.argv[1])
    os.chown(names["SECRET"], 65534, 65534)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is this user's own
import test_ways_out
from luthier.sandbox.sandbox import missing_walls, sandbox_report
mode = sys.argv[2]
if mode == "refused":  # a machine that refuses new spaces to ordinary users
    from luthier.sandbox.cell import seccomp
    libc.prctl(38, 1, 0, 0, 0)
    refusing = seccomp.Filter()
    refusing.add(seccomp.LOAD, seccomp.NUMBER)
    for name in ("unshare", "setns", "mount"):
        refusing.refuse(seccomp.REFUSED[name][seccomp.machine()[1]])
    refusing.add(seccomp.RETURN, seccomp.ALLOW)
    seccomp.rules = lambda *arguments: refusing
    assert seccomp.install(libc, True, os.getpid())
    from luthier.sandbox.pool import POOL
    mode = POOL.mode()
escaped = test_ways_out.attempts(json.loads(sys.argv[1]), mode, sys.argv[3] == "hook")
answer = {"escaped": escaped, "mode": mode}
print(json.dumps({**answer, "missing": missing_walls(), "report": sandbox_report()}))
"""


@pytest.mark.long
@pytest.mark.parametrize("mode", [ROOT_MODE, slow(BUBBLEWRAP_MODE), slow("refused")])
@pytest.mark.parametrize("hook", ["hook", "kernel"])
def test_no_way_out_for_an_ordinary_user(outside, mode, hook, tmp_path):
    """The same as `nobody`, who owns the secret; also where new spaces are refused."""
    if not stands(ROOT_MODE) or os.getuid() != 0:
        pytest.skip("needs root, to become nobody")
    if mode == BUBBLEWRAP_MODE and not stands(mode):
        pytest.skip("needs bubblewrap")
    for folder in (os.path.dirname(outside["SECRET"]), *map(str, ROOT.parents), str(ROOT)):
        if not os.stat(folder).st_mode & 0o001:
            os.chmod(folder, os.stat(folder).st_mode | 0o011)
    base = os.path.dirname(outside["SECRET"])
    while base != "/tmp" and base != "/":
        os.chmod(base, 0o755)
        base = os.path.dirname(base)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, json.dumps(outside), mode, hook],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    if mode in (ROOT_MODE, BUBBLEWRAP_MODE):
        assert set(answer["escaped"]) <= (HARMLESS if hook == "kernel" else set())
    if mode == BUBBLEWRAP_MODE:
        return
    if mode == ROOT_MODE:
        assert answer["missing"] == "" and answer["report"]["root folder of its own (kernel)"]
    else:
        assert answer["mode"] == FILTER_MODE and "namespaces" in answer["missing"]
        allowed = set(VISIBLE)
        if hook == "kernel":
            allowed |= HARMLESS | {
                "priority of the tests",
                "limits of the tests",
                "home",
                "tmp",
                "run",
                "system",
            }
            allowed |= {name for name in WAYS if "ctypes" in name or "interpreter" in name}
        assert set(answer["escaped"]) <= allowed
