"""Processes to be killed, at no cost: each is the fork of one that has imported what a run needs, has run
nothing, and has one thread.

Importing takes ten times as long as what such a process then does. What depends on how a process begins is
tested in real ones.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

PARENT = """
import json, os, sys
import torch
torch.set_num_threads(1)
import luthier.run.run, luthier.compat.lazy_imports
luthier.compat.lazy_imports.import_models()
import accelerate, peft, torch.fx.experimental.symbolic_shapes, transformers.models.llama.modeling_llama
os.fsync = lambda descriptor: None  # a kill loses nothing that was written
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    code, folder, args, errors = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.chdir(folder)
        sys.argv = ["-c", *args]
        exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
        sys.stderr.flush()
        os._exit(0)
    print(child, file=answers, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
os._exit(0)
"""


class Fork:
    """A process that runs some code in a folder."""

    def __init__(self, parent: subprocess.Popen, code: str, folder: Path, *args: str):
        self.parent, self.errors = parent, folder / "errors.txt"
        print(json.dumps([code, str(folder), args, str(self.errors)]), file=parent.stdin, flush=True)
        self.pid, self.ended = int(parent.stdout.readline()), None

    def poll(self) -> int | None:
        """How it ended, None while it runs."""
        if self.ended is None and select.select([self.parent.stdout], [], [], 0)[0]:
            self.wait()
        return self.ended

    def wait(self) -> int:
        if self.ended is None:
            self.ended = int(self.parent.stdout.readline())
        return self.ended

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def said(self) -> str:
        return self.errors.read_text()[-2000:]


@contextmanager
def parent() -> Iterator[Callable[..., Fork]]:
    """Gives forks; one runs at a time."""
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as made:
        yield partial(Fork, made)  # at the end its input is closed, and it leaves
