"""Rewards tell right from wrong, and the sandbox keeps in what a model wrote."""

import os
import threading
import time

import pytest

from luthier.errors import RecipeError
from luthier.registry import build
from luthier.sandbox.sandbox import _run, run, run_many, sandbox_report

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def go(code, timeout=5.0, **more):
    return run(code, timeout=timeout, memory_mb=256, **more)


def grade(*texts, tests=TESTS, row=(), **settings):
    return build("reward", {"name": "python_tests", **settings}).scores(
        {"tests": tests, **dict(row)}, list(texts)
    )


# ------------------------------------------------------------------------------------------------ exact match


@pytest.mark.parametrize(
    ("settings", "answer", "text", "score"),
    [
        ({}, "Paris", " Paris\n", 1.0),
        ({}, "Paris", "paris", 0.0),
        ({"ignore_case": True}, "Paris", "PARIS", 1.0),
        ({"ignore_punctuation": True}, "Paris", "Paris.", 1.0),
        ({"ignore_space": False}, "a b", "a  b", 0.0),
        ({}, ["two", "2"], "2", 1.0),
        ({"extract": "last_number"}, "1,234", "so 17 and then 1234.0 apples.", 1.0),
        ({"extract": "last_number"}, 5, "3-5", 1.0),
        ({"extract": "last_number"}, -5, "it is -5", 1.0),
        ({"extract": "last_number"}, 5, "no idea", 0.0),
        ({"extract": "last_number"}, "none", "none", 0.0),
        ({"extract": "after"}, "3*4=12\n#### 12", "I think\n#### 12\nbye", 1.0),
        ({"extract": "after", "marker": "=>"}, 12, "3*4=12; => 12", 1.0),
        ({"extract": "after", "marker": "=>"}, 12, "=> 12; no: => 13", 0.0),
        ({"extract": "after"}, "12", "12", 0.0),
    ],
)
def test_exact_match(settings, answer, text, score):
    assert build("reward", {"name": "exact_match", **settings}).scores({"answer": answer}, [text]) == [score]


@pytest.mark.parametrize(("name", "column"), [("exact_match", "answer"), ("python_tests", "tests")])
def test_a_row_without_its_column_is_refused(name, column):
    with pytest.raises(RecipeError, match=column):
        build("reward", name).scores({"prompt": "?"}, ["!"])


def test_code_that_needs_its_prompt_is_told_so():
    row, body = {"prompt": "def f(x):"}, "\n    return x + 1"
    with pytest.raises(RecipeError, match="prefix: prompt"):
        grade(body, tests=["assert f(1) == 2"], row=row)
    assert grade(body, "\n    return x", tests=["assert f(1) == 2"], row=row, prefix="prompt") == [1.0, 0.0]
    assert grade("no code (", tests=["assert f(1) == 2"], row=row) == [0.0]  # wrong either way


# ------------------------------------------------------------------------------------------------ mathematics


@pytest.fixture(scope="module")
def mathematics():
    pytest.importorskip("math_verify")
    return build("reward", "math")


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [
        ("1/2", "The answer is 0.5", 1.0),
        ("0.5", r"so we get \boxed{\frac{1}{2}}", 1.0),
        (r"\frac{3}{4}", "$0.75$", 1.0),
        (r"x^2+2x+1", r"$\boxed{(x+1)^2}$", 1.0),
        (r"\{1, 2\}", r"$\{2,1\}$", 1.0),
        (12, r"First 7, then \boxed{12}.", 1.0),
        ("12", r"\boxed{13}", 0.0),
        ("12", "", 0.0),
        ("7", "5 7 9", 0.0),
        ("two words", "two words", 1.0),
    ],
)
def test_math(mathematics, answer, text, score):
    assert mathematics.scores({"answer": answer}, [text]) == [score]


def test_math_ends_what_never_ends_and_goes_on_in_any_thread(mathematics):
    quick, scores = build("reward", {"name": "math", "timeout": 1.0}), []
    texts = ["$9^{9^{9^{9}}}$", "$12$"]
    thread = threading.Thread(target=lambda: scores.extend(quick.scores({"answer": "12"}, texts)))
    thread.start()
    thread.join(30)
    assert scores == [0.0, 1.0]


def test_math_says_how_to_install_what_it_needs(monkeypatch):
    monkeypatch.setattr("luthier.methods.rewards.verifiers.math.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install"):
        build("reward", "math")


# ------------------------------------------------------------------------------------------------ tests of code


def test_right_half_right_and_wrong_code():
    half = "def add(a, b):\n    return 3"
    fenced = f"Sure!\n```python\n{ADD}```\nUse it:\n```python\nprint(add(1, 1))\n```"
    assert grade(ADD, half, "def add(a, b): return 7", "def add(a, b:", fenced, "") == [
        1.0,
        0.5,
        0.0,
        0.0,
        1.0,
        0.0,
    ]
    assert grade(ADD, half, all_or_nothing=True) == [1.0, 0.0]


def test_one_string_of_tests_counts_every_assert():
    tests = (
        "import math\nx = add(1, 2)\nassert x == 3\nassert math.isclose(add(.1, .2), .3)\nassert add(1, 1)"
        " == 3\n"
    )
    assert grade(ADD, tests=tests) == [pytest.approx(2 / 3)]
    assert grade(ADD, tests="def check(f):\n    assert f(1, 1) == 2\ncheck(add)") == [1.0]
    with pytest.raises(RecipeError, match="check nothing"):
        grade(ADD, tests="def check(f):\n    assert f(1, 1) == 2\n")
    with pytest.raises(RecipeError, match="not Python"):
        grade(ADD, tests=["assert add("])


def test_code_that_completes_a_prompt():
    assert grade("    return a + b\n", row={"prompt": "def add(a, b):\n"}, prefix="prompt") == [1.0]


CHEATS = {
    "exit": "import sys\nsys.exit(0)",
    "exit in the function": "import os\ndef add(a, b):\n    os._exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "prints": "print('passed 0 passed 1')\nimport sys; sys.exit()",
    "writes to every pipe": (
        """
import os
for i in range(3, 40):
    try: os.write(i, b'["passed", 0]\\n' * 2)
    except OSError: pass
os._exit(0)"""
    ),
    "equal to all": "class All:\n    def __eq__(self, other): return True\ndef add(a, b): return All()",
    "equal number": "class All(int):\n    __eq__ = lambda self, other: True\ndef add(a, b): return All(9)",
    "no parser": "import ast\nast.parse = lambda *a: ast.Module([], [])",
    "no builtins": "import builtins\nbuiltins.exec = builtins.vars = builtins.compile = lambda *a: {}",
    "raises": "def add(a, b): raise SystemExit(0)",
}


@pytest.mark.parametrize("code", CHEATS.values(), ids=list(CHEATS))
def test_a_test_is_not_passed_by_cheating(code):
    assert grade(code) == [0.0]


def test_cheating_in_containers_and_builtins():
    pair = "class All:\n    def __eq__(self, other): return True\ndef f(): return [All(), (All(),)]"
    assert grade(pair, tests=["assert f() == [1, (2,)]"]) == [0.0]
    lying = "import builtins\nbuiltins.sum = lambda x: 3\ndef f(): return [1]"
    assert grade(lying, tests=["assert sum(f()) == 3"]) == [0.0]
    own = (
        "class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, other): return self.x =="
        " other.x"
    )
    tests = ["assert P(1) == P(1)", "assert [P(1)] == [P(1)]", "assert P(1) == P(2)"]
    assert grade(own, tests=tests) == [pytest.approx(2 / 3)]


def test_a_check_that_does_not_end_fails_itself_and_what_follows():
    code = "def f(x):\n    while x: pass\n    return x"
    tests = ["assert f(0) == 0", "assert f(1) == 1", "assert f(0) == 0"]
    assert grade(code, tests=tests, timeout=1.0) == [pytest.approx(1 / 3)]


# ------------------------------------------------------------------------------------------------ the sandbox


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
        import asyncio, collections, dataclasses, heapq, json, random, re, sqlite3, subprocess, tempfile, threading
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
        report[f"{wall} (kernel)"] for wall in ("read-only files", "no network", "own processes only")
    ):
        pytest.skip("this machine gives no namespaces")

    def past(code, timeout=5.0):
        return _run(code, timeout=timeout, memory_mb=256, hook=False)[0]

    assert "Read-only" in past("open('/dev/shm/luthier-evil', 'w')").reason  # where else everyone may write
    assert "unreachable" in past("import socket\nsocket.create_connection(('1.1.1.1', 80), 1)").reason
    assert past("import os\nprint(os.getpid(), os.listdir('/proc'))").stdout == "1 []\n"
    # a bomb of at most 32 processes that leave their group; the sleeps are named, so that survivors would be
    # seen
    if report["limits processes (kernel)"]:
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
