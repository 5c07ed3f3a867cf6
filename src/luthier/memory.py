"""How much memory a step will take, before it is taken: what moves, what backward keeps, what comes and goes.

What backward keeps is not guessed from the architecture: some rows are read once, and autograd says what it holds on to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.batch import Batch
from luthier.kernels import logprobs
from luthier.roles import Roles
from luthier.transforms._chain import Chain

LIBRARY = 200 * 2**20  # bytes that matrix libraries and late imports take, measured (benchmarks/memory.py), as is the head's packing


@dataclass(frozen=True)
class Need:
    """Bytes of a step, beyond what the process holds with its models loaded."""

    moving: int  # gradients; for estimators without them, a displaced copy of what moves
    state: int  # of the optimizer, with masters of low-precision weights
    update: int  # what the update of the largest tensor makes
    activations: int  # what backward keeps of a micro-batch
    passing: int  # what a layer, the head and the matrix library make and give back

    @property
    def total(self) -> int:
        return self.moving + self.state + max(self.activations + self.passing, self.update)

    def told(self) -> str:
        parts = {"gradients": self.moving, "optimizer": self.state, "activations": self.activations, "passing": self.passing}
        return ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items()) + " GB"


def predict(roles: Roles, chain: Chain, estimator: Any, batch: Batch, tokens: int) -> Need:
    """What a micro-batch of `tokens` tokens takes. batch: a few rows like those to come; they are read once, with gradients."""
    moving = [p for s in roles.tuner.sites() for p in s.slots.values() if p.requires_grad]
    model = roles.policy.model
    backward = "grad" in estimator.gives
    count, largest = sum(p.numel() for p in moving), max((p.numel() for p in moving), default=0)
    low = sum(p.numel() for p in moving if p.dtype.itemsize < 4)
    head = model.get_output_embeddings()
    logits = 0 if head is None else 4 * len(head.weight) * min(tokens, logprobs.chunk_size(len(head.weight)))
    wide = max(m.weight.shape[0] for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head) if head is not None else 0
    packed = 0 if head is None or head.weight.is_cuda else head.weight.nbytes * (2.6 if backward else 1.0)
    return Need(
        moving=sum(p.nbytes for p in moving),
        state=sum(map(_state, chain.transforms)) * count + 4 * low,
        update=16 * largest,
        activations=round(_kept(roles, batch) * tokens / max(1, len(batch.ids))) if backward else 0,
        passing=round(2 * logits + (6 if backward else 4) * tokens * wide * next(model.parameters()).dtype.itemsize + packed) + LIBRARY,
    )


def _state(transform: Any) -> int:
    """Bytes of state that a transform of single tensors keeps for each number."""
    init = getattr(transform, "init", None)
    return 0 if init is None else sum(x.nbytes for x in init(torch.zeros(64, 64)).values() if torch.is_tensor(x)) // 64**2


def _kept(roles: Roles, batch: Batch) -> int:
    """Bytes that backward holds on to, weights apart."""
    model = roles.policy.model
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    was = model.training
    model.train()
    try:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            said = roles.policy(batch.view()).logprobs  # alive until all is counted
            del said
    finally:
        model.train(was)
    return sum(held.values())
