"""The process of whoever calls: after a run, or after a model was loaded, its seeds, precision and threads
are as they were before.

Runs seed the global generators, since dropout and other libraries draw from them.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_lock = threading.Lock()
_users = 0  # runs and loads that are going on, in whatever threads
_before: Any = None  # what the first of them came upon


@contextmanager
def restored() -> Iterator[None]:
    """Global state is restored when the last of those that use it at a time has ended."""
    global _users, _before
    with _lock:
        _users += 1
        if _users == 1:
            _before = _state()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _restore(_before)
                _before = None


def _state() -> dict[str, Any]:
    cuda = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        cuda = torch.cuda.get_rng_state_all()
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
    }


def _restore(state: dict[str, Any]) -> None:
    """Only what differs is set: some of these settings cost time or warn when they are set."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    now = _state()
    if now["dtype"] != state["dtype"]:
        torch.set_default_dtype(state["dtype"])
    if now["threads"] != state["threads"]:
        torch.set_num_threads(state["threads"])
    deterministic = (state["deterministic"], state["warn_only"])
    if (now["deterministic"], now["warn_only"]) != deterministic:
        torch.use_deterministic_algorithms(state["deterministic"], warn_only=state["warn_only"])
    if now["matmul"] != state["matmul"]:
        torch.set_float32_matmul_precision(state["matmul"])
    if now["cudnn"] != state["cudnn"]:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = state["cudnn"]
