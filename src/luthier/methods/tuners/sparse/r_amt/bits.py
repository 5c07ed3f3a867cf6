"""Masks as bits, eight to a byte."""

import torch
import torch.nn.functional as F


def pack(mask: torch.Tensor) -> torch.Tensor:
    """[..] truth values -> their bits, eight to a byte, the first in the lowest."""
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1).to(torch.uint8)


def unpack(bits: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The way back."""
    flags = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return flags.flatten()[: shape.numel()].view(shape).bool()
