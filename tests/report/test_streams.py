"""Standard output that fails ends no command; what runs out of memory or threads is a sentence."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from luthier.errors import OutOfMemory, RecipeError, TooManyThreads, outcome_of
from luthier.report.streams import SteadyStream


def test_a_stream_that_fails_is_dropped():
    reading, writing = os.pipe()
    os.close(reading)
    stream = SteadyStream(os.fdopen(writing, "w"))
    stream.write("x" * 100_000)
    stream.flush()
    stream.write("more")
    stream.flush()
    assert isinstance(stream.failure, BrokenPipeError)
    closed = SteadyStream(io.StringIO())
    closed.stream.close()
    assert closed.write("abc") == 3 and isinstance(closed.failure, ValueError)


@pytest.mark.long
def test_commands_where_output_cannot_be_written():
    command = [sys.executable, "-c", "from luthier.cli import main; main()", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("could not create a memory object"),
        RuntimeError("could not create a primitive"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_memory_that_runs_out_is_known_by_every_name(error):
    assert isinstance(outcome_of(error), OutOfMemory)


def test_threads_that_run_out_are_known():
    for error in (
        RuntimeError("can't start new thread"),
        BlockingIOError(11, "Resource temporarily unavailable"),
    ):
        assert isinstance(outcome_of(error), TooManyThreads)
    for error in (ValueError("no"), RecipeError("out of memory, says the recipe")):
        assert outcome_of(error) is error
