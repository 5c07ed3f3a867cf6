"""Freed memory is kept by the process, not handed back to the system: on CPUs, being handed it anew (page by page, zeroed)
took a fourth of a training step's time at 26M parameters. Any MALLOC_ variable leaves memory to its user."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # as in malloc.h


def keep_memory() -> bool:
    """Ask glibc for it, for the rest of this process; not where its user has said how it shall keep memory (MALLOC_...)."""
    if sys.platform != "linux" or any(k.startswith("MALLOC_") for k in os.environ):
        return False
    try:
        ask = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(ask(MMAP_MAX, 0) and ask(TRIM_THRESHOLD, 2**31 - 1))
