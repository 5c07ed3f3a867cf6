"""A local page for everything the command line does: look at rows, choose methods, train, watch, compare,
talk, export.

It holds nothing of its own. A run is a folder, started as `luthier tune` in a process of its own from a
recipe that the page shows; whoever closes the page, or the studio, leaves the run going. `server.py` answers
the page, `run_store.py` reads the folders and starts runs, `worker.py` does what needs torch, in processes of
their own, so that the page answers while a model is loaded.
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
        raise RecipeError(f"folder {home} does not exist")
    with listening(port) as server_socket:
        token = secrets.token_urlsafe(24)

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                tell(f"luthier studio: http://127.0.0.1:{server_socket.getsockname()[1]}/?token={token}")
                tell(
                    "Open this address in a browser. Anyone who has it can use this machine as you."
                    " Ctrl-C ends the studio, not its runs."
                )

        config = uvicorn.Config(studio(home, token), log_level="warning", server_header=False, ws="none")
        Server(config).run(sockets=[server_socket])


def listening(port: int | None) -> socket.socket:
    """A listening socket of this machine that nobody outside reaches: on this port, else on the usual one,
    else on a free one. Raises RecipeError where the port is taken.
    """
    candidates = (PORT, 0)
    if port is not None:
        candidates = (port,)
    for candidate in candidates:
        server_socket = socket.socket()
        server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server_socket.bind(("127.0.0.1", candidate))
            server_socket.listen(128)  # two sockets may be bound to a port, but only one listens
            return server_socket
        except OSError:
            server_socket.close()
    raise RecipeError(f"port {port} is in use; choose another with --port, or leave --port out")
