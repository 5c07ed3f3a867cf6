"""What holds for every file of the house: nothing foreign is run, nobody is told, what ends in a file can be
read.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT

HOME = ROOT / "src" / "luthier"


FILES = sorted(HOME.rglob("*.py"))


UNPICKLE = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


RUNS = {"eval", "exec", "compile", "system", "popen"}  # text as a program


# inside the sandbox; expressions this package wrote itself
MAY_RUN = {"sandbox/cell/answer.py", "sandbox/cell/judge.py", "toy/tasks/code.py"}


def calls(nodes: list[ast.AST]):
    """(name, call) of every call among nodes, by the last part of what is called."""
    for node in nodes:
        if isinstance(node, ast.Call):
            f = node.func
            yield (
                ast.unparse(f),
                f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else "",
                node,
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOME)))
def test_nothing_foreign_is_run(path):
    """No pickle is loaded, no model's own code is trusted, and text becomes a program in the sandbox only.
    What another library calls private is used in compat/ alone.
    """
    where = str(path.relative_to(HOME))
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = {a.name for a in node.names} | {getattr(node, "module", "") or ""}
            assert not UNPICKLE & {m.split(".")[0] for m in modules}
        if isinstance(node, ast.ImportFrom) and not node.level and not where.startswith("compat/"):
            private = [a.name for a in node.names if a.name.startswith("_")]
            assert node.module.startswith("luthier") or not private, f"{where}: {private} belong into compat/"
    for whole, name, call in calls(nodes):
        assert whole != "torch.load", f"{where}: torch.load; safetensors carry no code"
        if name in RUNS and (isinstance(call.func, ast.Name) or whole.startswith("os.")):
            assert where in MAY_RUN, f"{where}: {whole}"
        for k in call.keywords:
            assert k.arg != "trust_remote_code" or (
                isinstance(k.value, ast.Constant) and k.value.value is False
            ), where
            assert k.arg != "shell", where


def test_nobody_is_told_what_is_tuned_here():
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_TELEMETRY"}
    said = "import luthier, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    out = subprocess.run(
        [sys.executable, "-c", said], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "True"
