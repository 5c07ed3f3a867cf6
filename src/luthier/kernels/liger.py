"""liger-kernel's RMSNorm and rotary positions (Triton), for CUDA: an extra, chosen by `architecture:
{name: causal, fused: liger}`.

They take the places of our own fast forms (elementwise.py) and are tested in the same two ways before
anything is trained: each on random numbers, all of them on the first batch. Not run by us on a GPU yet: what
is tested is when they are taken, what is refused, and with what they are called.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.kernels.elementwise import FastForms


def forms(device: torch.device) -> FastForms:
    """liger's forms for a network on `device`. Raises RecipeError where they cannot run."""
    if device.type != "cuda":
        raise RecipeError(
            f"fused: liger-kernel needs a CUDA device, but the model is on {device.type}; leave"
            " it out to use luthier's own kernels"
        )
    missing = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
    if missing:
        raise RecipeError(f"fused: {' and '.join(missing)} must be installed: pip install 'luthier[liger]'")
    return bound(import_module("liger_kernel.ops.rms_norm"), import_module("liger_kernel.ops.rope"))


def bound(norms: Any, ropes: Any) -> FastForms:
    """The forms that two of liger's modules offer, with our arguments as theirs. Gradients are not written
    over: others may hold them.
    """

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norms.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        return ropes.LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin, None, heads)

    return FastForms(norm, rotary)
