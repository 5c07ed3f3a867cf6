"""Codes of b bits side by side: eight of them in b bytes, whatever b is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """[n] codes below 2**bits -> [ceil(n / 8) * bits] bytes."""
    if bits == 8:
        return codes.to(torch.uint8).flatten()
    eight = F.pad(codes.flatten().to(torch.int64), (0, -codes.numel() % 8)).view(-1, 8)
    word = (eight << (bits * torch.arange(8, device=codes.device))).sum(1)
    return ((word[:, None] >> (8 * torch.arange(bits, device=codes.device))) & 255).to(torch.uint8).flatten()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The way back: [n] codes as bytes."""
    if bits == 8:
        return packed[:n]
    word = (packed.view(-1, bits).to(torch.int64) << (8 * torch.arange(bits, device=packed.device))).sum(1)
    eight = (word[:, None] >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
    return eight.flatten()[:n].to(torch.uint8)
