"""Rewards tell right from wrong, and the sandbox keeps in what a model wrote."""

from __future__ import annotations

import os
import time

import pytest

from helpers.code import grade
from luthier.sandbox.sandbox import _run, run, run_many, sandbox_report


def go(code, timeout=5.0, **more):
    return run(code, timeout=timeout, memory_mb=256, **more)


def test_a_check_that_does_not_end_fails_itself_and_what_follows():
    code = "def f(x):\n    while x: pass\n    return x"
    tests = ["assert f(0) == 0", "assert f(1) == 1", "assert f(0) == 0"]
    assert grade(code, tests=tests, timeout=1.0) == [pytest.approx(1 / 3)]


def test_input_output_and_errors():
    result = go("print(input() + '!')", stdin="hällo\n")
    assert (result.ok, result.stdout, result.reason) == (True, "hällo!\n", "")
    assert go("import sys\nsys.exit(3)").reason == "exit 3"
    assert go("def f(:").reason.startswith("SyntaxError")
    failed = go("print('before')\n1 / 0")
    assert failed.reason.startswith("ZeroDivisionError") and failed.stdout == "before\n"
    assert "line 2" in failed.stderr and "_cell" not in failed.stderr
    assert go("import os\nos.abort()").reason.startswith("signal")
    assert go(r"import sys; sys.stdout.buffer.write(b'\xff\xfeok')").stdout.endswith("ok")
    assert go("print(hash('a'))").stdout == go("print(hash('a'))").stdout


def test_an_endless_loop_is_late():
    start = time.monotonic()
    assert go("while True: pass", timeout=0.5).reason == "timeout"
    assert (
        go("import time\ntry: time.sleep(60)\nexcept BaseException: time.sleep(60)", timeout=0.5).reason
        == "timeout"
    )
    assert time.monotonic() - start < 4


def test_memory_and_output_are_bounded():
    assert go("x = 'a' * (10 ** 10)").reason == "memory"
    assert go("x = []\nwhile True: x.append(bytearray(1 << 20))").reason == "memory"
    result = go("import sys\nfor _ in range(200): sys.stdout.write('x' * 100000)")
    assert result.ok and len(result.stdout) == 64 * 1024
    assert not go("with open('big', 'wb') as f:\n    for _ in range(100): f.write(bytes(1 << 20))").ok


REFUSED = {
    "write": "open('{outside}', 'w')",
    "append": "import os; os.open('{outside}', os.O_WRONLY | os.O_CREAT)",
    "link": "import os; os.symlink('{folder}', 'door'); open('door/evil', 'w')",
    "remove": "import os; os.remove('{present}')",
    "rename": "import os; os.rename('{present}', 'mine')",
    "system": "import os; os.system('true')",
    "subprocess": "import subprocess; subprocess.run(['true'])",
    "posix subprocess": "import _posixsubprocess; _posixsubprocess.fork_exec()",
    "fork": "import os; os.fork()",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "kill": "import os; os.kill(os.getppid(), 9)",
    "network": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "datagram": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "lookup": "import socket; socket.gethostbyname('localhost')",
    "ctypes": "import ctypes",
    "limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (900, 900))",
}


@pytest.mark.parametrize("walls", [True, False], ids=["with namespaces", "audit hook alone"])
@pytest.mark.parametrize("code", REFUSED.values(), ids=list(REFUSED))
def test_reaching_out_is_refused(code, walls, tmp_path):
    present = tmp_path / "present"
    present.write_text("here")
    for word, path in (("{outside}", tmp_path / "evil"), ("{folder}", tmp_path), ("{present}", present)):
        code = code.replace(word, str(path))
    result = _run(code, timeout=5, memory_mb=256, walls=walls)[0]
    assert not result.ok and result.reason.split(":")[0] in ("PermissionError", "ImportError")
    assert os.listdir(tmp_path) == ["present"]


def test_ordinary_programs_are_not_refused():
    code = """
        import asyncio, collections, dataclasses, heapq, json
        import random, re, sqlite3, subprocess, tempfile, threading
        @dataclasses.dataclass
        class Point:
            x: int
        async def later():
            await asyncio.sleep(0)
        asyncio.run(later())
        threads = [threading.Thread(target=print, args=(i,)) for i in range(4)]
        [t.start() for t in threads]; [t.join() for t in threads]
        with open('notes', 'w') as f: f.write('a')
        with tempfile.NamedTemporaryFile('w') as f: f.write('a')
        sqlite3.connect(':memory:').execute('select 1')
        print(open('notes').read(), Point(1), __name__)
    """
    result = go("\n".join(line[8:] for line in code.splitlines()))
    assert result.ok and result.stdout.endswith("a Point(x=1) __main__\n"), result


def test_the_kernel_keeps_in_what_gets_past_the_hook():
    report = sandbox_report()
    if not all(
        report[f"{wall} (kernel)"]
        for wall in ("read-only file system", "no network", "other processes hidden")
    ):
        pytest.skip("this machine gives no namespaces")

    def past(code, timeout=5.0):
        return _run(code, timeout=timeout, memory_mb=256, hook=False)[0]

    assert "Read-only" in past("open('/dev/shm/luthier-evil', 'w')").reason  # where else everyone may write
    assert "unreachable" in past("import socket\nsocket.create_connection(('1.1.1.1', 80), 1)").reason
    assert past("import os\nprint(os.getpid(), os.listdir('/proc'))").stdout == "1 []\n"
    # a bomb of at most 32 processes that leave their group; the sleeps are named, so that survivors would be
    # seen
    if report["limited number of processes (kernel)"]:
        mark = f"60.{os.getpid()}"
        each = f"os.setsid(); os.execv('/bin/sleep', ['sleep', '{mark}'])"
        bomb = (
            f"import os\nn = 0\nwhile n < 100:\n    if not os.fork(): {each}\n    n += 1\n    print(n,"
            " flush=True)"
        )
        result = past(bomb)
        assert result.reason.startswith("BlockingIOError") and len(result.stdout.split()) < 32
        assert not any(mark in line for line in command_lines())


def command_lines():
    """What every process on the machine was started with."""
    lines = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/cmdline") as file:
                lines.append(file.read())
        except OSError:  # ended in between
            pass
    return lines


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for walls in (True, False):
        assert _run("open('notes', 'w').write('a')", timeout=5, memory_mb=256, walls=walls)[0].ok
        late = _run("import os\nos.mkdir('d')\nwhile True: pass", timeout=0.5, memory_mb=256, walls=walls)[0]
        assert late.reason == "timeout"
    assert os.listdir(tmp_path) == []


def test_the_environment_stays_outside(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert (
        go("import os\nprint(sorted(os.environ))").stdout
        == "['HOME', 'LANG', 'PATH', 'PYTHONHASHSEED', 'TMPDIR']\n"
    )


def test_many_at_once_come_back_in_order():
    jobs = [{"code": f"print({i})", "timeout": 10, "memory_mb": 256} for i in range(12)]
    assert [r.stdout for r in run_many(jobs)] == [f"{i}\n" for i in range(12)]
    assert run_many([]) == []
