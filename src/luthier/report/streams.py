"""Standard output and error of a command that goes on where they fail: the reader of a pipe may have left,
the disk of a log may be full, a terminal may know ASCII alone.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any


class SteadyStream:
    """A text stream whose first failure is remembered, and what is written after it is dropped."""

    buffer = None  # what writes bytes must not pass by

    def __init__(self, stream: Any):
        self.stream = stream
        self.failure: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: OSError | ValueError) -> None:
        """From here on into nothing: what is left in the stream's buffer would fail again at the end."""
        self.failure = self.failure or error
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def steady() -> SteadyStream | None:
    """Make the standard streams of this process steady; standard output, where there is one."""
    for descriptor in range(3):  # or the next file that is opened would be taken for a stream that is closed
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, SteadyStream(stream))
    return sys.stdout if isinstance(sys.stdout, SteadyStream) else None
