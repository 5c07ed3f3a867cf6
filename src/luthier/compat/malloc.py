"""Freed memory is kept by the process, not handed back to the system: on CPUs, being handed it anew (page by
page, zeroed) took a fourth of a training step's time at 26M parameters. Any MALLOC_ variable leaves memory to
its user."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass, field

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
    # glibc's own settings
    compat.on_exit(lambda: ask(MMAP_MAX, 65536))
    compat.on_exit(lambda: ask(TRIM_THRESHOLD, 128 * 1024))
    return bool(ask(MMAP_MAX, 0) and ask(TRIM_THRESHOLD, 2**31 - 1))


def _mapped() -> set[tuple[int, int]]:
    """First and last address of every mapped file of weights; none where the system does not say."""
    if sys.platform != "linux":
        return set()
    ranges = set()
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.rstrip().endswith(".safetensors"):
                start, end = line.split()[0].split("-")
                ranges.add((int(start, 16), int(end, 16)))
    return ranges


@dataclass
class Mapped:
    """Files of weights that this process maps from now on. What has been read of them need not stay in
    memory.
    """

    before: set[tuple[int, int]] = field(default_factory=_mapped)

    def drop(self) -> None:
        """Let go of all their pages; whoever reads on has them from the file again. Nothing may have been
        written to them.
        """
        for start, end in _mapped() - self.before:
            address = ctypes.c_void_p(start)
            length = ctypes.c_size_t(end - start)
            ctypes.CDLL(None).madvise(address, length, DONTNEED)
