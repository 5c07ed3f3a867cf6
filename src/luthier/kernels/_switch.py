"""Whether fast paths are taken just now: all of their state that changes while a process runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

# numbers up to which the network's own code is taken: a token being decoded, where calls cost more than
# memory
SMALL = 2**15


class _State:
    plain = 0  # how many ask for the network's own code just now
    smallest = SMALL  # numbers from which on the element-wise kernels are taken
    compiled = False  # has anything been compiled in this process?


@contextmanager
def plainly() -> Iterator[None]:
    """The network's own code, for a while: no element-wise kernels, nothing compiled."""
    _State.plain += 1
    uncompiled = torch.compiler.set_stance("force_eager") if _State.compiled else nullcontext()
    try:
        with uncompiled:
            yield
    finally:
        _State.plain -= 1


@contextmanager
def always() -> Iterator[None]:
    """The element-wise kernels however small the tensors are, for a while: to test them."""
    before, _State.smallest = _State.smallest, 0
    try:
        yield
    finally:
        _State.smallest = before


def note_compiled() -> None:
    """From here on `plainly` has something to switch off."""
    _State.compiled = True


def use_fast(x: Tensor) -> bool:
    """Are element-wise kernels to be taken for x, and can they be?"""
    return not _State.plain and x.numel() >= _State.smallest and not differentiated_otherwise()


def differentiated_otherwise() -> bool:
    """Is somebody taking forward derivatives or transforming functions (torch.func)? Only plain operations
    know how.
    """
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None
