"""Hidden states below the lowest layer that is trained: computed once for each row, kept in a file, and read
in every later epoch.

Where a tuner moves only upper layers or the head, everything below is the same function in every step and in
every role that the network plays. A tree of segments is stored under its tokens and is computed alone, so
that what is stored does not depend on the batch it was first read in: a resumed run reads the same numbers.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.kernels.tolerance import logprob_tolerance
from luthier.model.batch import Batch
from luthier.model.dropout import has_dropout
from luthier.model.policy import eval_mode
from luthier.storage import files
from luthier.train.trunk import Recorder, Trunk, why_no_trunk

if TYPE_CHECKING:
    from luthier.model.network import Network

LIMIT = 8 * 2**30  # bytes of the file at most, and never more than half of the free disk


class StopForward(Exception):
    """The lowest trained layer was handed its hidden states: no need to go on."""


@dataclass
class HiddenStateCache:
    """Hidden states [tokens, d] as they enter the lowest trained layer, in a memory-mapped file."""

    path: Path
    layers: nn.ModuleList
    first: int  # the lowest trained layer
    table: Tensor  # [tokens, d]
    # tokens and shape of a tree -> its first row in the table
    starts: dict[bytes, int] = field(default_factory=dict)
    # [rows of the table in use]; runs that share a table share this list
    fill_level: list[int] = field(default_factory=lambda: [0])
    trunk: Trunk | None = None  # what rows begin with: read and stored once

    @property
    def used(self) -> int:
        """Rows of the table in use."""
        return self.fill_level[0]

    def states(
        self, architecture: Any, model: Network, attached: Any, batch: Batch, fill: bool
    ) -> Tensor | None:
        """[L, d] for the tokens of a batch; None where it is an altered view, or one of its trees is not
        stored.

        fill: compute and store what is missing, as long as there is room.
        """
        alone = None if batch.altered else trees(batch)
        if alone is None:
            return None
        states = []
        for tree in alone:
            key, size = _key(tree), len(tree.ids)
            trunk = self.trunk if self.trunk is not None and self.trunk.begins(tree) else None
            if trunk is not None:
                size -= len(trunk.tokens)
                states.append(trunk.states)
            if key not in self.starts:
                if not fill or self.used + size > len(self.table):
                    return None
                computed = self._compute(architecture, model, attached, tree, trunk)
                self.table[self.used : self.used + size] = computed
                self.starts[key] = self.used
                self.fill_level[0] += size
            start = self.starts[key]
            states.append(self.table[start : start + size])
        return torch.cat(states).to(batch.ids.device)

    @torch.no_grad()
    def read_trunk(self, architecture: Any, model: Network, attached: Any, tokens: Sequence[int]) -> None:
        """Read what rows begin with; the network is in evaluation mode."""
        ids = torch.tensor(tokens, device=model.get_input_embeddings().weight.device)
        index = torch.zeros_like(ids)
        tree = Batch(ids, ids, index.bool(), index, index[:1] - 1, index[:0], index[:0], [])
        recorder = Recorder(self.layers)
        states = self._compute(architecture, model, attached, tree, record=recorder)
        self.trunk = Trunk(ids.cpu(), states, recorder.prefixes)

    @torch.no_grad()
    def _compute(
        self,
        architecture: Any,
        model: Network,
        attached: Any,
        tree: Batch,
        trunk: Trunk | None = None,
        record: Recorder | None = None,
    ) -> Tensor:
        """[L, d] of a tree's tokens, without those of the trunk that it begins with."""
        states: list[Tensor] = []
        before = nullcontext()
        if trunk is not None:
            tree, before = trunk.rest(tree), trunk.before(self.layers)

        def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])
            raise StopForward

        layout, inputs = architecture.laid_out(model, attached, tree)
        if trunk is not None:
            inputs["position_ids"] = layout.position + len(trunk.tokens)
        if record is not None:
            masks = inputs["attention_mask"]
            for mask in masks.values() if isinstance(masks, dict) else [masks]:
                mask.plan.record = record
        hook = self.layers[self.first].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with before:
                model(**inputs, use_cache=False)
        except StopForward:
            pass
        finally:
            hook.remove()
        return states[0].flatten(0, 1)[layout.place].cpu()

    @contextmanager
    def skipped(self, hidden: Tensor) -> Iterator[None]:
        """While the network runs, the layers below do nothing, and the lowest trained one is handed `hidden`
        [R, W, d].
        """

        def put(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        lower = list(self.layers[: self.first])
        hook = self.layers[self.first].register_forward_pre_hook(put, with_kwargs=True)
        for layer in lower:
            layer.forward = _unchanged
        try:
            yield
        finally:
            hook.remove()
            for layer in lower:
                del layer.forward

    def close(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def _unchanged(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def open_cache(
    policy: Any, batch: Batch, path: Path, tokens: int, beginning: Sequence[int] = ()
) -> HiddenStateCache | str:
    """A cache for `tokens` tokens, or why there can be none. batch: some rows, to see which layers the tuner
    trains. beginning: tokens that rows begin with, to be read once.
    """
    model, attached, arch = policy.model, policy.attached, policy.architecture
    if not hasattr(arch, "laid_out"):
        return f"architecture '{arch.name}' does not support it"
    if attached.rewrites_inputs or getattr(arch, "neftune_noise_alpha", 0):
        return "the model's input changes at every step"
    if attached.reads_layers:
        return "the tuner reads the states of every layer"
    config = model.config.get_text_config()
    lists = [
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers
    ]
    if len(lists) != 1:
        return "the model's layers are not in one list"
    first, width, dtype = _lowest_trained(policy, lists[0], batch)
    if first < 1:
        return "the tuner trains the lowest layer"
    if has_dropout(model, outside=lists[0][first:]):
        return "the lower layers use dropout"
    available = min(LIMIT, shutil.disk_usage(path.parent).free // 2)
    room = min(tokens, available // (width * dtype.itemsize))
    if room < 1:
        return "there is not enough free disk space"
    path.unlink(missing_ok=True)
    if not files.reserve(path, room * width * dtype.itemsize):
        return "there is not enough free disk space"
    table = torch.from_file(str(path), shared=True, size=room * width, dtype=dtype).view(room, width)
    cache = HiddenStateCache(path, lists[0], first, table)
    if beginning and why_no_trunk(arch, model) is None:
        with eval_mode(model):
            cache.read_trunk(arch, model, attached, beginning)
    if not _agrees(policy, batch, cache):
        cache.close()
        return "the cached values differ from the model's own"
    return cache


@torch.no_grad()
def _agrees(policy: Any, batch: Batch, cache: HiddenStateCache) -> bool:
    """Does the network answer as it does without the cache?"""
    model, attached, arch = policy.model, policy.attached, policy.architecture
    with eval_mode(model):
        expected = arch.forward(model, attached, batch).logprobs
        if cache.states(arch, model, attached, batch, fill=True) is None:
            return True  # no room even for these
        attached.hidden_cache = cache
        try:
            logprobs = arch.forward(model, attached, batch).logprobs
        finally:
            attached.hidden_cache = None
    return float((logprobs - expected).abs().mean()) <= logprob_tolerance(model)


def _lowest_trained(policy: Any, layers: nn.ModuleList, batch: Batch) -> tuple[int, int, torch.dtype]:
    """The lowest layer that is trained, or whose input depends on what is: by asking autograd; -1 where
    layers return more than states. With it the width and precision of hidden states.
    """
    inputs: list[Tensor] = []
    depends: list[bool] = []  # does this input depend on what is trained?
    plain: list[bool] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        depends.append(inputs[-1].requires_grad)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        plain.append(torch.is_tensor(output))

    moving = [p for p in policy.attached.parameters().values() if p.is_floating_point()]
    flags = [p.requires_grad for p in moving]
    hooks: list[Any] = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(after))
    try:
        for p in moving:  # tuners that move different layers in turn
            p.requires_grad_(True)
        with torch.enable_grad():
            policy.architecture.forward(policy.model, policy.attached, batch)
    finally:
        for p, flag in zip(moving, flags, strict=True):
            p.requires_grad_(flag)
        for hook in hooks:
            hook.remove()
    width, dtype = inputs[0].shape[-1], inputs[0].dtype
    passes, depends = len(inputs) / len(layers), depends[: len(layers)]  # of the first pass
    if passes != int(passes) or not all(plain) or depends != sorted(depends):
        return -1, width, dtype
    # inputs that nothing trained has touched: the last of them enters the first layer that is trained
    return depends.count(False) - 1, width, dtype


def trees(batch: Batch) -> list[Batch] | None:
    """Each root with what continues it, as a batch of its own; None where trees are not one after the
    other.
    """
    parents = batch.parent.tolist()
    roots = [s for s, p in enumerate(parents) if p < 0]
    starts = torch.tensor([0, *batch.sizes]).cumsum(0).tolist()
    out = []
    for root, end in zip(roots, [*roots[1:], len(parents)], strict=True):
        parent = torch.tensor(parents[root:end]) - root
        parent[0] = -1
        if any(p < 0 for p in parent.tolist()[1:]):
            return None
        tokens = slice(starts[root], starts[end])
        supervised = torch.zeros(starts[end] - starts[root], dtype=torch.bool, device=batch.ids.device)
        out.append(
            replace(
                batch,
                ids=batch.ids[tokens],
                labels=batch.labels[tokens],
                supervised=supervised,
                segment=batch.segment[tokens] - root,
                parent=parent.to(batch.ids.device),
                completion=batch.completion[:0],
                group=batch.group[:0],
                rows=[],
                read={},
                metrics={},
            )
        )
    return out


def digest(*tensors: Tensor) -> bytes:
    """128 bits that stand for the numbers of integer tensors."""
    return hashlib.blake2b(torch.cat(tensors).cpu().numpy().tobytes(), digest_size=16).digest()


def _key(tree: Batch) -> bytes:
    segments = torch.tensor([len(tree.parent)], device=tree.ids.device)
    return digest(segments, tree.parent, tree.segment, tree.ids)
