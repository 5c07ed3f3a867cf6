"""The process of a program: runs it, then answers what the judge of its checks asks of it.

Nothing that the program must not know comes here: no check, no expected value, no secret. Whatever the
program does to this process, it can only change the values it gives.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Started by the keeper as `program JOB ASKED ANSWERS`, numbers of open files."""
    import builtins
    import os

    from . import answer, hook, wire

    job_file, questions, answers = (int(number) for number in sys.argv[1:4])
    with open(job_file, "rb") as file:
        job = wire.loads(file.read().decode())
    if job["hook"]:
        hook.watch(os.getcwd())
    for name in [m for m in sys.modules if m.partition(".")[0] == "cell"]:
        del sys.modules[name]
    module = type(sys)("__main__")
    # with checks the program is a library: what it does when started as a script (read input, exit) is not
    # asked for
    module.__name__ = "__program__" if job["checked"] else "__main__"
    module.__builtins__ = builtins
    sys.modules["__main__"] = sys.modules[module.__name__] = module
    sys.argv = [answer.PROGRAM]
    leave, flush = os._exit, sys.stdout.flush
    helper = answer.Answers(module, questions, answers)
    ok = helper.run(job["code"])
    if ok and job["checked"]:
        helper.serve()
    for empty in (flush, sys.stdout.flush, sys.stderr.flush):
        try:
            empty()
        except BaseException:
            pass
    leave(0 if ok else 1)
