"""Freed memory is kept by the process, not handed back to the system: on CPUs, being handed it anew (page by
page, zeroed) took a fourth of a training step's time at 26M parameters. Any MALLOC_ variable leaves memory to
its user."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

from luthier import compat

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # as in malloc.h
DONTNEED = 4  # as in mman.h


def keep_memory() -> bool:
    """Set it in glibc for as long as a run lasts (in the command line: the process), unless the user has set
    MALLOC_... in the environment.
    """
    if sys.platform != "linux" or any(k.startswith("MALLOC_") for k in os.environ):
        return False
    try:
        ask = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    if not compat.active():
        return False
    compat.on_exit(lambda: give_back(ask))
    return bool(ask(MMAP_MAX, 0) and ask(TRIM_THRESHOLD, 2**31 - 1))


def give_back(mallopt: Any) -> None:
    """glibc's own settings again."""
    mallopt(MMAP_MAX, 65536)
    mallopt(TRIM_THRESHOLD, 128 * 1024)


class Mapped:
    """Files of weights that this process maps from now on. What has been read of them need not stay in
    memory.
    """

    def __init__(self):
        self.before = set(_mapped())

    def drop(self) -> None:
        """Let go of all their pages; whoever reads on has them from the file again. Nothing may have been
        written to them.
        """
        for start, end in set(_mapped()) - self.before:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONTNEED)


def _mapped() -> list[tuple[int, int]]:
    if sys.platform != "linux":
        return []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        some = (line.split()[0].split("-") for line in file if line.rstrip().endswith(".safetensors"))
        return [(int(a, 16), int(b, 16)) for a, b in some]
