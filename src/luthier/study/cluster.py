"""Workers of one search on a Ray cluster: each asks, measures and writes down for itself; what holds them
together is the storage.

Ray is told nothing but to start them, one a GPU where there are as many; a worker that dies is started again
and goes on with what it had begun. RAY_ADDRESS names the cluster; without it Ray is started on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError

WAKES = 1.0  # seconds between two looks at what came in


def ray() -> Any:
    """The library; a sentence where it is missing."""
    try:
        import ray
    except ImportError:
        raise RecipeError("--workers needs Ray: pip install 'luthier[ray]'") from None
    return ray


def workers(number: int, work: Callable[[int], None], storage: str | None, look: Callable[[], None]) -> None:
    """Run work(0), ..., work(number - 1) side by side, looking now and then. Raises the sentence that one
    ended with.
    """
    lib = ray()
    ours = not lib.is_initialized()
    if ours:
        lib.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR", configure_logging=False)
    try:
        if len(lib.nodes()) > 1 and storage is None:
            raise RecipeError(
                "--workers on several machines need --storage: the URL of a database that all of them reach"
            )
        have = lib.cluster_resources()
        share = {"num_gpus": 1} if have.get("GPU", 0) >= number else {}
        started = lib.remote(max_retries=2, num_cpus=max(0.01, have.get("CPU", 1) / number), **share)(_from)
        running = [started.remote(str(Path.cwd()), work, i) for i in range(number)]
        while running:
            done, running = lib.wait(running, timeout=WAKES)
            look()
            for one in done:
                try:
                    lib.get(one)
                except lib.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, RecipeError) else error) from None
    finally:
        if ours:
            lib.shutdown()


def _from(place: str, work: Callable[[int], None], number: int) -> None:
    """Relative paths of a recipe mean what they mean where the command was given."""
    try:
        os.chdir(place)
    except OSError:
        raise RecipeError(
            f"a worker's machine has no folder {place}: workers want the command's folder, model and rows at"
            " hand"
        ) from None
    work(number)
