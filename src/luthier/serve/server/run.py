"""Starts the server, says how it is reached, and ends it: at SIGTERM or Ctrl-C what is being written is
written to its end, for a while.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from luthier.errors import RecipeError

PORT = 8000  # tried first; else any that is free
TOKEN = "LUTHIER_TOKEN"  # environment variable with the token, where it is not to be drawn
SHORTEST_TOKEN = 16
CONNECTIONS = 1024  # at once, in any state


def serve(
    words: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    dtype: str | None = None,
    max_running: int = 64,
    max_waiting: int = 128,
    max_tokens: int = 1024,
    grace: float = 30.0,
    tell: Callable[[str], object] = print,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C.

    Args:
        words: RUN or NAME=RUN: runs, exported adapters, model folders, hub names or toy:NAME.
        host: the address to listen on.
        port: by default 8000, or a free one.
        dtype: of the networks; by default as they were tuned.
        max_running: answers that are written at once.
        max_waiting: prompts that wait for a place; more are refused for now (429).
        max_tokens: of an answer whose request says nothing about it.
        grace: seconds after which answers that are still being written are cut off at the end.
        tell: hears what a person should know.

    Raises:
        RecipeError: a model cannot be served, or the port is taken.
    """
    try:
        import uvicorn

        from luthier.serve.server.app import Limits, application
    except ModuleNotFoundError as error:
        raise RecipeError(f"serving needs {error.name}: pip install 'luthier[serve]'") from None
    from luthier.serve.server.engine import Engine
    from luthier.serve.server.models import load_served

    token, drawn = server_token()
    with listening(host, port) as server_socket, ends_on_sigterm():
        served = load_served(words, dtype)
        engine = Engine(served.groups, max_running, max_waiting)
        local = host in ("127.0.0.1", "localhost", "::1")
        app = application(served, engine, token, Limits(max_tokens, max_running), local)
        address = f"http://{host}:{server_socket.getsockname()[1]}"

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                for note in served.notes:
                    tell(f"· {note}")
                for line in greeting(address, list(served.models), token if drawn else f"${TOKEN}"):
                    tell(line)

            async def on_tick(self, counter: int) -> bool:
                return engine.failure is not None or await super().on_tick(counter)

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                engine.drain()
                loop = asyncio.get_running_loop()
                cut = loop.call_later(grace, engine.stop, 0.0)
                if engine.count_running() or engine.count_waiting():
                    tell(f"luthier serve: ending; answers that are being written have {grace:.0f} seconds")
                await super().shutdown(sockets)
                cut.cancel()

        config = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            ws="none",
            access_log=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=int(grace) + 10,
        )
        Server(config).run(sockets=[server_socket])
    if engine.failure:
        raise RecipeError(f"the server had to end: {engine.failure}")


def server_token() -> tuple[str, bool]:
    """(what requests must bring, whether it was drawn and not taken from the environment). Raises RecipeError
    where it is too short.
    """
    token = os.environ.get(TOKEN, "").strip()
    if token and (len(token) < SHORTEST_TOKEN or not token.isascii()):
        raise RecipeError(f"{TOKEN} must have at least {SHORTEST_TOKEN} ASCII characters")
    return token or secrets.token_urlsafe(24), not token


def greeting(address: str, names: Sequence[str], token: str) -> list[str]:
    """How the server is reached. token: as it is shown."""
    question = {"model": names[0], "messages": [{"role": "user", "content": "Hello"}]}
    body = json.dumps(question, ensure_ascii=False).replace("'", "'\\''")
    return [
        f"luthier serve: {address}/v1, as OpenAI's API; models: {', '.join(names)}",
        f"Token (api_key): {token}",
        f"Try: curl {address}/v1/chat/completions -H \"Authorization: Bearer {token}\""
        f" -H 'Content-Type: application/json' -d '{body}'",
        "Ctrl-C ends it.",
    ]


def listening(host: str, port: int | None) -> socket.socket:
    """A listening socket: on this port, else on the usual one, else on a free one. Raises RecipeError."""
    candidates = (PORT, 0)
    if port is not None:
        candidates = (port,)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reason: Any = None
    for candidate in candidates:
        server_socket = socket.socket(family)
        server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server_socket.bind((host, candidate))
            server_socket.listen(CONNECTIONS)
            return server_socket
        except OSError as error:
            reason = error.strerror or error
            server_socket.close()
    raise RecipeError(f"{host} port {port or PORT} cannot be used ({reason}); choose another with --port")


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Within this, SIGTERM ends the process with exit code 0: while models are loaded at once, and later when
    the server has ended, which then raises the signal again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
