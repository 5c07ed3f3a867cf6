"""Tensors on their way to an accelerator: all in one copy, from pinned memory, for which nobody waits."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

ALIGNED = 16  # bytes: where each tensor begins in the buffer


def to_device(tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """The same tensors on a device. On CUDA, those of the CPU share one buffer there."""
    device = torch.device(device)
    waiting = {id(x): x.contiguous() for x in tensors.values() if x.is_cpu}
    if device.type != "cuda" or not waiting:
        return {name: x.to(device) for name, x in tensors.items()}
    places: dict[int, int] = {}  # of a tensor -> first byte
    size = 0
    for key, x in waiting.items():
        places[key] = size
        size += -(-x.nbytes // ALIGNED) * ALIGNED
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for key, x in waiting.items():
        _part(buffer, places[key], x).copy_(x)
    arrived = buffer.to(device, non_blocking=True)
    parts = {key: _part(arrived, places[key], x) for key, x in waiting.items()}
    sent = {}
    for name, x in tensors.items():
        sent[name] = parts[id(x)] if id(x) in parts else x.to(device)
    return sent


def _part(buffer: Tensor, first: int, like: Tensor) -> Tensor:
    """A view of a buffer's bytes from `first` on, with the type and shape of a tensor."""
    last = first + prod(like.shape) * like.element_size()
    return buffer[first:last].view(like.dtype).view(like.shape)
