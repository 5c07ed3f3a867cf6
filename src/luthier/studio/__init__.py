"""A local page for everything the command line does: look at rows, choose methods, train, watch, compare,
talk, export.

It holds nothing of its own. A run is a folder, started as `luthier tune` in a process of its own from a
recipe that the page shows; whoever closes the page, or the studio, leaves the run going. `server.py` answers
the page, `shelf.py` knows the folders, `worker.py` does what needs torch, in processes of their own, so that
the page answers while a model is loaded.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from pathlib import Path

from luthier.errors import RecipeError

PORT = 8765  # tried first; else any that is free


def serve(home: Path, port: int | None = None, tell: Callable[[str], object] = print) -> None:
    """Answer on this machine alone until Ctrl-C. home: where runs and uploads lie. Raises RecipeError where
    it cannot.
    """
    try:
        import uvicorn

        from luthier.studio.server import studio
    except ModuleNotFoundError as error:
        raise RecipeError(f"the studio needs {error.name}: pip install 'luthier[studio]'") from None
    if not home.is_dir():
        raise RecipeError(f"there is no folder {home}")
    with listening(port) as ear:
        token = secrets.token_urlsafe(24)
        tell(f"luthier studio: http://127.0.0.1:{ear.getsockname()[1]}/?token={token}")
        tell(
            "Open this address; who has it can use this machine as you. Ctrl-C ends the studio, not the runs."
        )
        made = studio(home, token)
        uvicorn.Server(uvicorn.Config(made, log_level="warning", server_header=False, ws="none")).run(
            sockets=[ear]
        )


def listening(port: int | None) -> socket.socket:
    """A socket of this machine that nobody outside reaches: the port asked for, else the usual one, else a
    free one.
    """
    for wanted in (port,) if port is not None else (PORT, 0):
        ear = socket.socket()
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            ear.bind(("127.0.0.1", wanted))
            return ear
        except OSError:
            ear.close()
    raise RecipeError(f"port {port} is taken; give another --port, or none")
