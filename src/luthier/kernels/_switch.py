"""Whether fast paths are taken just now: all of their state that changes while a process runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

# numbers up to which a CPU takes the network's own code: a token being decoded, where calls cost more than
# memory
SMALL = 2**15


class State:
    """What changes for the whole process. Whoever compiles a network sets `compiled`."""

    compiled = False  # has anything been compiled in this process?


class ThreadState(threading.local):
    """What changes for one thread: another may train meanwhile, and its numbers are not to depend on it."""

    plain = 0  # how many contexts of `plainly` are open
    smallest = SMALL  # numbers from which on the element-wise kernels are taken


_own = ThreadState()


@contextmanager
def plainly() -> Iterator[None]:
    """The network's own code, for a while: no element-wise kernels, nothing compiled."""
    _own.plain += 1
    uncompiled = nullcontext()
    if State.compiled:
        uncompiled = torch.compiler.set_stance("force_eager")
    try:
        with uncompiled:
            yield
    finally:
        _own.plain -= 1


@contextmanager
def always() -> Iterator[None]:
    """The element-wise kernels however small the tensors are, for a while: to test them."""
    before = _own.smallest
    _own.smallest = 0
    try:
        yield
    finally:
        _own.smallest = before


def use_fast(x: Tensor) -> bool:
    """Are element-wise kernels to be taken for x, and can they be?"""
    large = x.is_cuda or x.numel() >= _own.smallest
    return large and not _own.plain and not differentiated_otherwise()


def differentiated_otherwise() -> bool:
    """Is somebody taking forward derivatives or transforming functions (torch.func)? Only plain operations
    know how.
    """
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None
