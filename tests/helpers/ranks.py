"""Several processes that train together, at little cost: forks of one process that has imported what a run
needs and has run nothing.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

PARENT = """
import atexit, json, os, sys, time, traceback
import torch
torch.set_num_threads(1)
import luthier.run.run, luthier.cli, luthier.compat.lazy_imports
luthier.compat.lazy_imports.import_models()
import accelerate, peft, torch.fx.experimental.symbolic_shapes, transformers.models.llama.modeling_llama
import torch.distributed.distributed_c10d
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

def perform(code):
    status = 0
    try:
        exec(compile(code, "<rank>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        status = error.code or 0
    except BaseException as error:
        traceback.print_exc()
        sys.last_value, status = error, 1
    atexit._run_exitfuncs()
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(status)

for line in sys.stdin:
    code, folder, args, count, environment, limit = json.loads(line)
    began, ranks = time.monotonic(), {}
    for rank in range(count):
        child = os.fork()
        if not child:
            os.chdir(folder)
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            errors = os.open(f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(errors, 1); os.dup2(errors, 2)
            sys.argv = ["luthier", *args]
            perform(code)
        ranks[child] = rank
    ends = {}
    while ranks:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            ends[ranks.pop(child)] = os.waitstatus_to_exitcode(status), time.monotonic() - began
        elif time.monotonic() - began > limit:
            for child in ranks: os.kill(child, 9)
        else:
            time.sleep(0.02)
    print(json.dumps([ends[rank] for rank in range(count)]), file=answers, flush=True)
os._exit(0)
"""


class Ends(NamedTuple):
    """How the ranks ended."""

    codes: list[int]
    seconds: list[float]
    texts: list[str]  # what each of them wrote


def run(
    parent: subprocess.Popen,
    code: str,
    folder: Path,
    *args: str,
    count: int = 2,
    limit: float = 60,
    environment: Mapping[str, str] | None = None,
) -> Ends:
    """Run code in `count` ranks, in a folder. limit: seconds after which those that are left are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    around = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "ACCELERATE_USE_CPU": "1",
        **(environment or {}),
    }
    request = [textwrap.dedent(code), str(folder), args, count, around, limit]
    print(json.dumps(request), file=parent.stdin, flush=True)
    ends = json.loads(parent.stdout.readline())
    texts = [(folder / f"rank-{rank}.txt").read_text() for rank in range(count)]
    return Ends([code for code, _ in ends], [seconds for _, seconds in ends], texts)


@contextmanager
def ranks() -> Iterator[Callable[..., Ends]]:
    """Gives (code, folder, *args, ...) -> how the ranks ended."""
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as parent:
        yield partial(run, parent)
