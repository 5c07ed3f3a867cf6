"""What training on one row costs: floating-point operations of a forward and a backward pass, and the storage
of a tuned copy.

Operations are counted as they are dispatched (matrix products and attention), so what a tuner avoids is not
counted: weight gradients of frozen matrices, the backward pass below the lowest trained layer.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("gflops_per_row", "GFLOPs per training row", better="lower"),
        Metric("stored_mb", "stored size (MB)", better="lower"),
    ],
    row="personalized-unit-test-models",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="you compare tuners by operations per row and by what a tuned copy stores, rather than by"
    " seconds on one machine.",
    costs="a forward and backward pass over `n` rows.",
)
class Cost(Evaluator):
    """`gflops_per_row` of a training pass of -log p, and `stored_mb` of the trainable tensors."""

    n: Annotated[int, Field(ge=1)] = 8  # rows that are read

    def run(self, roles, rows, folder, when):
        rows, moving = (
            liked(rows)[: self.n],
            [p for p in roles.tuner.parameters().values() if p.requires_grad],
        )
        if not rows:
            return {}
        grads = [p.grad for p in moving]
        with torch.enable_grad(), FlopCounterMode(display=False) as counted:
            loss = roles.policy.logprobs(roles.batch(rows)).sum()
            if loss.requires_grad:
                torch.autograd.grad(loss, moving, allow_unused=True)
        for p, g in zip(moving, grads, strict=True):
            p.grad = g
        stored = sum(p.numel() * p.element_size() for p in moving)
        return {"gflops_per_row": counted.get_total_flops() / len(rows) / 1e9, "stored_mb": stored / 2**20}
