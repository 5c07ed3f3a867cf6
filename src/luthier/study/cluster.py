"""Workers of one search on a Ray cluster: each suggests, measures and writes down for itself; what they share
is the storage.

Ray only starts them, one a GPU where there are as many. A worker that dies is started again and resumes what
it had begun. RAY_ADDRESS names the cluster; without it Ray is started on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError

INTERVAL = 1.0  # seconds between two looks at what was measured


def load_ray() -> Any:
    """The library. Raises RecipeError where it is missing."""
    try:
        import ray
    except ImportError:
        raise RecipeError("--workers needs Ray: pip install 'luthier[ray]'") from None
    return ray


def run_workers(
    number: int, work: Callable[[int], None], storage: str | None, look: Callable[[], None]
) -> None:
    """Run work(0), ..., work(number - 1) side by side, and call `look` now and then. Raises the error that a
    worker ended with.
    """
    lib = load_ray()
    started_here = not lib.is_initialized()
    if started_here:
        lib.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR", configure_logging=False)
    try:
        if len(lib.nodes()) > 1 and storage is None:
            raise RecipeError(
                "--workers on several machines needs --storage: the URL of a database that all"
                " of them can reach"
            )
        resources = lib.cluster_resources()
        options: dict[str, Any] = {"num_cpus": max(0.01, resources.get("CPU", 1) / number)}
        if resources.get("GPU", 0) >= number:
            options["num_gpus"] = 1
        remote = lib.remote(max_retries=2, **options)(_work_in)
        running = [remote.remote(str(Path.cwd()), work, i) for i in range(number)]
        while running:
            done, running = lib.wait(running, timeout=INTERVAL)
            look()
            for task in done:
                _result(lib, task)
    finally:
        if started_here:
            lib.shutdown()


def _result(lib: Any, task: Any) -> None:
    """Raises what a worker ended with, as RecipeError where it was one."""
    try:
        lib.get(task)
    except lib.exceptions.RayTaskError as error:
        if isinstance(error.cause, RecipeError):
            raise error.cause from None
        raise


def _work_in(folder: str, work: Callable[[int], None], number: int) -> None:
    """Relative paths of a recipe mean what they mean where the command was given."""
    try:
        os.chdir(folder)
    except OSError:
        raise RecipeError(
            f"folder {folder} does not exist on a worker's machine; every worker needs the"
            " search folder, the model and the rows"
        ) from None
    work(number)
