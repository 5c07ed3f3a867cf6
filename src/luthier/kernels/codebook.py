"""Four-bit codes back to numbers: two at a time, by one look-up of the byte that holds them.

A byte holds two codes, so there are 256 pairs of levels, each as wide as one 64-bit number: a single gather
reads both. On a CPU that is about ten times faster than looking up each level. `plain` is the twin.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

CHUNK = 2**19  # bytes expanded at once where the result is narrower than fp32
CHUNK_ON_CUDA = 2**26  # about a whole weight: each piece costs five launches


def pack(codes: Tensor) -> Tensor:
    """[n] codes of 0 to 15, n even -> [n / 2] bytes; the first of two in the upper half, as bitsandbytes has
    it.
    """
    codes = codes.to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2]


def plain(
    packed: Tensor, levels: tuple[float, ...], scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[n / 2] bytes, 16 levels, [n / block] scales -> [n] numbers: level times scale of the block, in fp32,
    then rounded.
    """
    codes = torch.stack([packed >> 4, packed & 15], 1).long()
    table = torch.tensor(levels, dtype=torch.float32, device=packed.device)
    blocks = table[codes].view(len(scale), -1)
    return (blocks * scale[:, None]).flatten().to(dtype)


def expand(
    packed: Tensor, levels: tuple[float, ...], scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The same, by pairs."""
    pairs = _pairs(levels, packed.device)
    if dtype == torch.float32:
        return _look_up(packed, pairs, scale).flatten()
    out = torch.empty(2 * len(packed), dtype=dtype, device=packed.device)
    block = 2 * len(packed) // len(scale)
    most = CHUNK if packed.is_cpu else CHUNK_ON_CUDA
    step = max(1, most // block) * block  # bytes of whole blocks
    for start in range(0, len(packed), step):
        stop = start + step
        piece = _look_up(packed[start:stop], pairs, scale[2 * start // block : 2 * stop // block])
        out[2 * start : 2 * stop].view(piece.shape).copy_(piece)
    return out


def _look_up(packed: Tensor, pairs: Tensor, scale: Tensor) -> Tensor:
    """[n / 2] bytes, [256] pairs, [n / block] scales -> [n / block, block] fp32."""
    levels = pairs.index_select(0, packed.int()).view(torch.float32)
    return levels.view(len(scale), -1).mul_(scale[:, None])


@lru_cache(maxsize=32)
def _pairs(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """[256] pairs of fp32 levels, each seen as one 64-bit number."""
    table, byte = torch.tensor(levels, dtype=torch.float32), torch.arange(256)
    pairs = torch.stack([table[byte >> 4], table[byte & 15]], 1)
    return pairs.contiguous().view(torch.int64).flatten().to(device)
