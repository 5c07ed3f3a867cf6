"""How much memory a step will take, before it is taken: what moves, what backward keeps, what comes and goes.

What backward keeps is not guessed from the architecture: some rows are read once, and autograd says what it
holds on to.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from luthier.errors import OutOfMemory
from luthier.kernels import logprobs
from luthier.model.batch import Batch
from luthier.model.policy import Roles
from luthier.train.optimizer import Chain, most

# bytes that matrix libraries and late imports take, with a backward pass and without
LIBRARY = {True: 100 * 2**20, False: 60 * 2**20}
# of what is free, up to which a prediction is trusted: it is right to about 15% (benchmarks/memory.py)
SURE = 0.9


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
        parts = {
            "gradients": self.moving,
            "optimizer": self.state,
            "activations": self.activations,
            "passing": self.passing,
        }
        return ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items()) + " GB"


def predict(
    roles: Roles, chain: Chain, estimator: Any, some: Sequence[Batch], tokens: int, recompute: bool = False
) -> Need:
    """What a micro-batch of `tokens` tokens takes. some: one or two batches of unlike size with rows like
    those to come, which are read once, with gradients; two tell what grows with the tokens from what does not
    (a tuned weight).

    recompute: with gradient checkpointing; a backward pass then holds what enters each layer, and all of one
    layer.
    """
    moving = [p for s in roles.tuner.param_groups() for p in s.params.values() if p.requires_grad]
    model = roles.policy.model
    backward = "grad" in estimator.provides
    count, largest = sum(p.numel() for p in moving), max((p.numel() for p in moving), default=0)
    low = sum(p.numel() for p in moving if p.dtype.itemsize < 4)
    asked, size = len(some[-1].owner) / max(1, len(some[-1].ids)), next(model.parameters()).dtype.itemsize
    head = model.get_output_embeddings()
    wide = max(
        (m.weight.shape[0] for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head),
        default=0,
    )
    passing = (6 if backward else 4) * tokens * wide * size + LIBRARY[backward]
    if head is not None:
        words, width = min(len(head.weight), logprobs.WORDS), head.weight.shape[1]
        passing += (3 if backward else 2) * 4 * words * min(round(asked * tokens), logprobs.chunk_size(words))
        passing += 0 if head.weight.is_cuda else 2 * words * width * size  # packed by the library
        # its gradient is summed in fp32
        passing += 4 * words * width if backward and any(p is head.weight for p in moving) else 0
    kept = _grown([(len(b.ids), _kept(roles, b)) for b in some], tokens) if backward else 0
    if recompute and (layers := getattr(model.config.get_text_config(), "num_hidden_layers", 0)):
        kept = min(
            kept, layers * tokens * model.get_input_embeddings().weight.shape[-1] * size + kept / layers
        )
    return Need(
        moving=sum(p.nbytes for p in moving),
        state=sum(map(_state, chain.transforms)) * count + 4 * low,
        update=16
        * (min(largest, most(roles.device)) if all(t.pointwise for t in chain.transforms) else largest)
        + (4 if backward else 8) * largest,
        activations=round(kept),
        passing=round(passing),
    )


def _grown(seen: Sequence[tuple[int, int]], tokens: int) -> float:
    """(tokens, bytes) of one or two readings -> bytes of `tokens` tokens."""
    (few, less), (many, more) = seen[0], seen[-1]
    if many <= few:
        return less * tokens / max(1, few)
    each = (more - less) / (many - few)
    return max(0.0, less - each * few) + each * tokens


def choose(
    roles: Roles,
    chain: Chain,
    estimator: Any,
    some: Sequence[Batch],
    tokens: int,
    longest: int,
    asked: bool | str,
) -> tuple[Need | None, list[str]]:
    """Switch gradient checkpointing on where a step would not fit without. What a step takes, and what a
    person should know of it.

    tokens: of a micro-batch. longest: of a row. asked: true, false or auto. some: as in `predict`.
    Raises OutOfMemory where not even one row would fit.
    """
    model, have = roles.policy.model, free(roles.device)
    told: list[str] = []
    if not have:  # nobody says what there is
        return None, told

    def need(recompute: bool, tokens: int) -> Need:
        return predict(roles, chain, estimator, some, tokens, recompute)

    can = getattr(model, "supports_gradient_checkpointing", False) and "grad" in estimator.provides
    plain, again = need(asked is True, tokens), asked is True
    if (
        asked == "auto"
        and can
        and plain.total > SURE * have
        and (less := need(True, tokens)).total < plain.total
    ):
        told.append(
            f"a step would take {gb(plain.total)} and {gb(have)} are free: activations are computed again in"
            f" backward (gradient_checkpointing), which takes {gb(less.total)}, more time, and changes no"
            " result"
        )
        model.gradient_checkpointing_enable({"use_reentrant": False})
        plain, again = less, True
    if plain.total <= have:
        return plain, told
    one = need(again, longest)
    if one.total > have / SURE + swap(roles.device):
        raise OutOfMemory(
            f"memory: one row alone is predicted to take {gb(one.total)} ({one.told()}) beside the model, and"
            f" {gb(have)} are free. Take a tuner that moves less, an optimizer that keeps less, a lower"
            " max_length or a smaller or quantized model"
            + ("" if again or not can else ", or gradient_checkpointing: true")
        )
    told.append(
        f"a step is predicted to take {gb(plain.total)} ({plain.told()}) and {gb(have)} are free: expect"
        " micro-batches to be split, which changes no result; a lower per_device_train_batch_size with more"
        " gradient_accumulation_steps spares the attempt"
    )
    return plain, told


def gb(size: float) -> str:
    return f"{size / 2**30:.1f} GB"


def free(device: torch.device) -> int:
    """Bytes that this process can still have; 0 where nobody says."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return _said("MemAvailable") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def swap(device: torch.device) -> int:
    return 0 if device.type == "cuda" else _said("SwapFree")


def _said(what: str) -> int:
    """Bytes, as the system tells them; 0 where it does not."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{what}:"))
    except (OSError, StopIteration):
        return 0


def _state(transform: Any) -> int:
    """Bytes of state that a transform of single tensors keeps for each number."""
    init = getattr(transform, "init", None)
    return (
        0
        if init is None
        else sum(x.nbytes for x in init(torch.zeros(64, 64)).values() if torch.is_tensor(x)) // 64**2
    )


def _kept(roles: Roles, batch: Batch) -> int:
    """Bytes that backward holds on to, weights apart."""
    model = roles.policy.model
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, StorageWeakRef] = {}
    sizes: list[int] = []

    # nothing is held, as nothing will be asked back: counting takes less than a step does
    def pack(x: Tensor) -> None:
        storage = x.untyped_storage()
        place = storage.data_ptr()
        if place in own or place in held and not held[place].expired():
            return
        held[place] = StorageWeakRef(storage)
        sizes.append(storage.nbytes())

    was: bool = model.training
    again: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    model.train()
    for m in again:
        m.gradient_checkpointing = False
    try:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with (
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        ):
            said = roles.policy(batch.view()).said  # alive until all is counted
            del said
    finally:
        model.train(was)
        for m in again:
            m.gradient_checkpointing = True
    return sum(sizes)
