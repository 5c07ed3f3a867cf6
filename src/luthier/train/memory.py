"""How much memory a step will take, before it is taken: what is trained, what backward keeps, what comes and
goes.

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

from luthier.compat.transformers import checkpoint_activations
from luthier.errors import OutOfMemory
from luthier.kernels import logprobs
from luthier.model.batch import Batch
from luthier.model.layout import rows_apart
from luthier.model.policy import Roles
from luthier.train.optimizer import Chain, piece_size

# bytes that matrix libraries and late imports take, with a backward pass and without
LIBRARY = {True: 100 * 2**20, False: 60 * 2**20}
# of what is free, up to which a prediction is trusted: it is right to about 15% (benchmarks/memory.py)
SURE = 0.9


@dataclass(frozen=True)
class Need:
    """Bytes of a step, beyond what the process holds with its models loaded."""

    gradients: int  # for estimators without gradients, the displaced copies that exist at once
    state: int  # of the optimizer, with masters of low-precision weights
    update: int  # intermediate tensors in the update of the largest tensor
    activations: int  # what backward keeps of a micro-batch
    temporary: int  # what a layer, the head and the matrix library allocate and free again

    @property
    def total(self) -> int:
        return self.gradients + self.state + max(self.activations + self.temporary, self.update)

    def describe(self) -> str:
        parts = {
            "gradients": self.gradients,
            "optimizer": self.state,
            "activations": self.activations,
            "temporary": self.temporary,
        }
        return ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items()) + " GB"


def predict(
    roles: Roles,
    chain: Chain,
    estimator: Any,
    samples: Sequence[Batch],
    tokens: int,
    recompute: bool = False,
    shared: float = 0.0,
) -> Need:
    """What a micro-batch of `tokens` tokens takes. samples: one or two batches of unlike size with rows like
    those to come, which are read once, with gradients; two tell what grows with the tokens from what does not
    (a tuned weight).

    recompute: with gradient checkpointing; a backward pass then holds what enters each layer, and all of one
    layer. shared: the share of tokens that are read with another row's, which begins alike.
    """
    positions = round(tokens * (1 - shared))
    moving: list[Tensor] = []
    count = size = largest = low_precision = 0  # numbers and bytes; the numbers of low-precision weights
    for group in roles.tuner.param_groups():
        for p in group.params.values():
            if p.requires_grad:
                moving.append(p)
                count += p.numel()
                size += p.nbytes
                largest = max(largest, p.numel())
                if p.dtype.itemsize < 4:
                    low_precision += p.numel()
    backward = "grad" in estimator.provides
    stepped = largest  # numbers of the largest tensor that are in work at once
    if all(t.pointwise for t in chain.transforms):
        stepped = min(largest, piece_size(roles.device))
    activations = 0.0
    if backward:
        activations = _activations(roles, samples, positions, recompute)
    supervised = tokens * len(samples[-1].owner) / max(1, len(samples[-1].ids))
    return Need(
        gradients=size if backward else estimator.displaced_bytes(chain),
        state=sum(map(_state, chain.transforms)) * count + 4 * low_precision,
        update=16 * stepped + (4 if backward else 8) * largest,
        activations=round(activations),
        temporary=round(_temporary(roles.policy.model, moving, positions, supervised, backward)),
    )


def _temporary(model: Any, moving: Sequence[Tensor], tokens: int, supervised: float, backward: bool) -> float:
    """Bytes that a layer, the head and the matrix library allocate and free again. supervised: how many of
    the tokens are.
    """
    size = next(model.parameters()).dtype.itemsize
    head = model.get_output_embeddings()
    width = 0  # of the widest layer
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            width = max(width, module.weight.shape[0])
    temporary: float = (6 if backward else 4) * tokens * width * size + LIBRARY[backward]
    if head is None:
        return temporary
    hidden, device = head.weight.shape[1], head.weight.device
    words = logprobs.WORDS_ON_CUDA if head.weight.is_cuda else logprobs.WORDS
    words = min(len(head.weight), words)
    chunk = min(round(supervised), logprobs.chunk_size(words, device))
    temporary += (3 if backward else 2) * 4 * words * chunk
    if not head.weight.is_cuda:
        temporary += 2 * words * hidden * size  # packed by the library
    if backward and any(p is head.weight for p in moving):
        temporary += 4 * words * hidden  # its gradient is summed in fp32
    return temporary


def _activations(roles: Roles, samples: Sequence[Batch], tokens: int, recompute: bool) -> float:
    """Bytes that backward keeps of a micro-batch."""
    model: Any = roles.policy.model
    measured = [(len(batch.ids), _saved_for_backward(roles, batch)) for batch in samples]
    saved = _extrapolate(measured, tokens)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    if not recompute or not layers:
        return saved
    words = getattr(model.get_input_embeddings(), "weight", None)
    if words is None:  # a row is not as many places as it has tokens
        return saved
    size, width = next(model.parameters()).dtype.itemsize, words.shape[-1]
    return min(saved, layers * tokens * width * size + saved / layers)


def _extrapolate(measured: Sequence[tuple[int, int]], tokens: int) -> float:
    """(tokens, bytes) of one or two batches -> bytes of `tokens` tokens."""
    (few, less), (many, more) = measured[0], measured[-1]
    if many <= few:
        return less * tokens / max(1, few)
    each = (more - less) / (many - few)
    return max(0.0, less - each * few) + each * tokens


def choose(
    roles: Roles,
    chain: Chain,
    estimator: Any,
    samples: Sequence[Batch],
    tokens: int,
    longest: int,
    checkpointing: bool | str,
    shared: float = 0.0,
) -> tuple[Need | None, list[str]]:
    """Switch gradient checkpointing on where a step would not fit without. What a step takes (None where free
    memory is unknown), and warnings about it.

    tokens: of a micro-batch. longest: of a row. checkpointing: true, false or auto. samples, shared: as in
    `predict`. Raises OutOfMemory where not even one row would fit.
    """
    model, have = roles.policy.model, free(roles.device)
    warnings: list[str] = []
    if not have:
        return None, warnings

    def need(recompute: bool, tokens: int, shared: float = 0.0) -> Need:
        return predict(roles, chain, estimator, samples, tokens, recompute, shared)

    can = getattr(model, "supports_gradient_checkpointing", False) and "grad" in estimator.provides
    recompute = checkpointing is True
    step = need(recompute, tokens, shared)
    if checkpointing == "auto" and can and step.total > SURE * have:
        less = need(True, tokens, shared)
        if less.total < step.total:
            warnings.append(
                f"a step is predicted to take {gb(step.total)}, and {gb(have)} are free:"
                f" gradient_checkpointing is on, which takes {gb(less.total)} and more time and"
                " does not change results"
            )
            checkpoint_activations(model)
            step, recompute = less, True
    if step.total <= have:
        return step, warnings
    row = need(recompute, longest)
    if row.total > have / SURE + swap(roles.device):
        advice = "" if recompute or not can else ", or gradient_checkpointing: true"
        raise OutOfMemory(
            f"memory: a single row is predicted to take {gb(row.total)} ({row.describe()}) in"
            f" addition to the model, and {gb(have)} are free. Use a tuner with fewer trainable"
            " parameters, an optimizer with less state, a lower max_length or a smaller or"
            f" quantized model{advice}"
        )
    warnings.append(
        f"a step is predicted to take {gb(step.total)} ({step.describe()}), and {gb(have)} are"
        " free: micro-batches will probably be split, which does not change results. A lower"
        " per_device_train_batch_size with more gradient_accumulation_steps avoids the failed"
        " attempt"
    )
    return step, warnings


def gb(size: float) -> str:
    return f"{size / 2**30:.1f} GB"


def free(device: torch.device) -> int:
    """Bytes that this process can still have; 0 where that is unknown."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return _meminfo("MemAvailable") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def swap(device: torch.device) -> int:
    """Bytes of swap that a process on this device could fall back on."""
    return 0 if device.type == "cuda" else _meminfo("SwapFree")


def _meminfo(name: str) -> int:
    """Bytes, as the system reports them; 0 where it does not."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith(f"{name}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _state(transform: Any) -> int:
    """Bytes of state that a transform of single tensors has for each number."""
    if not hasattr(transform, "init"):
        return 0
    state = transform.init(torch.zeros(64, 64))
    return sum(x.nbytes for x in state.values() if torch.is_tensor(x)) // 64**2


def _dense_parts(x: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold a tensor's numbers: of a sparse one its places and its values."""
    if x.layout == torch.strided:
        return (x,)
    if x.layout == torch.sparse_coo:
        return x._indices(), x._values()
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return x.crow_indices(), x.col_indices(), x.values()
    return x.ccol_indices(), x.row_indices(), x.values()


def _saved_for_backward(roles: Roles, batch: Batch) -> int:
    """Bytes that backward holds on to, weights apart."""
    model = roles.policy.model
    weights = {d.untyped_storage().data_ptr() for p in model.parameters() for d in _dense_parts(p)}
    counted: dict[int, StorageWeakRef] = {}
    sizes: list[int] = []

    # nothing is stored, as nothing will be read back: counting takes less than a step does
    def pack(x: Tensor) -> None:
        for dense in _dense_parts(x):
            storage = dense.untyped_storage()
            address = storage.data_ptr()
            if address in weights or address in counted and not counted[address].expired():
                continue
            counted[address] = StorageWeakRef(storage)
            sizes.append(storage.nbytes())

    training: bool = model.training
    checkpointed: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    model.train()
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with (
            rows_apart(),
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        ):
            values = roles.policy(batch.view()).checked_values  # alive until all is counted
            del values
    finally:
        model.train(training)
        for module in checkpointed:
            module.gradient_checkpointing = True
    return sum(sizes)
