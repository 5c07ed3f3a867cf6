"""Whether fast paths are taken just now: all of their state that changes while a process runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

# numbers up to which a CPU takes the network's own code: a token being decoded, where calls cost more than
# memory
SMALL = 2**15


class State:
    """What changes. Whoever compiles a network sets `compiled`."""

    plain = 0  # how many contexts of `plainly` are open
    smallest = SMALL  # numbers from which on the element-wise kernels are taken
    compiled = False  # has anything been compiled in this process?


@contextmanager
def plainly() -> Iterator[None]:
    """The network's own code, for a while: no element-wise kernels, nothing compiled."""
    State.plain += 1
    uncompiled = nullcontext()
    if State.compiled:
        uncompiled = torch.compiler.set_stance("force_eager")
    try:
        with uncompiled:
            yield
    finally:
        State.plain -= 1


@contextmanager
def always() -> Iterator[None]:
    """The element-wise kernels however small the tensors are, for a while: to test them."""
    before = State.smallest
    State.smallest = 0
    try:
        yield
    finally:
        State.smallest = before


def use_fast(x: Tensor) -> bool:
    """Are element-wise kernels to be taken for x, and can they be?"""
    large = x.is_cuda or x.numel() >= State.smallest
    return large and not State.plain and not differentiated_otherwise()


def differentiated_otherwise() -> bool:
    """Is somebody taking forward derivatives or transforming functions (torch.func)? Only plain operations
    know how.
    """
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None
