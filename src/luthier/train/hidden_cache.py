"""What frozen layers say of a row never changes: it is computed once, kept in a file, and read in every later
epoch.

Where a tuner moves only upper layers or the head, everything below the lowest layer that it reaches is the
same function in every step and in every role that the network plays. A tree of segments is kept by its
tokens, and is computed alone, so that what is kept does not depend on the company it was first read in: a
resumed run finds the same numbers.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.model.batch import Batch
from luthier.model.policy import eval_mode
from luthier.train.checks import tolerance

if TYPE_CHECKING:
    from luthier.model.network import Network

LIMIT = 8 * 2**30  # bytes of the file at most, and never more than half of the free disk


class StopForward(Exception):
    """The first layer that moves was handed its hidden states: no need to go on."""


@dataclass
class Frozen:
    """Hidden states [tokens, d] as they enter the lowest layer that moves, in a memory-mapped file."""

    path: Path
    layers: nn.ModuleList
    first: int  # the lowest layer that moves
    table: Tensor  # [room, d]
    # tokens and shape of a tree -> its first row in the table
    places: dict[bytes, int] = field(default_factory=dict)
    # rows of the table in use; runs that share a table share this
    filled: list[int] = field(default_factory=lambda: [0])

    @property
    def used(self) -> int:
        return self.filled[0]

    def states(
        self, architecture: Any, model: Network, attached: Any, batch: Batch, fill: bool
    ) -> Tensor | None:
        """[L, d] for the tokens of a batch; None where it is an altered view, or one of its trees is not
        kept.

        fill: keep what is missing, as long as there is room.
        """
        alone = None if batch.altered else trees(batch)
        if alone is None:
            return None
        found = []
        for tree in alone:
            key = _key(tree)
            if key not in self.places:
                if not fill or self.used + len(tree.ids) > len(self.table):
                    return None
                self.table[self.used : self.used + len(tree.ids)] = self._read(
                    architecture, model, attached, tree
                )
                self.places[key] = self.used
                self.filled[0] += len(tree.ids)
            found.append(self.table[self.places[key] : self.places[key] + len(tree.ids)])
        return torch.cat(found).to(batch.ids.device)

    @torch.no_grad()
    def _read(self, architecture: Any, model: Network, attached: Any, tree: Batch) -> Tensor:
        heard: list[Tensor] = []

        def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
            heard.append(args[0] if args else kwargs["hidden_states"])
            raise StopForward

        layout, inputs = architecture.laid_out(model, attached, tree)
        hook = self.layers[self.first].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            model(**inputs, use_cache=False)
        except StopForward:
            pass
        finally:
            hook.remove()
        real = (layout.piece >= 0).flatten()
        out = heard[0].new_empty(len(tree.ids), heard[0].shape[-1])
        return out.index_copy_(0, layout.source.flatten()[real], heard[0].flatten(0, 1)[real]).cpu()

    @contextmanager
    def skipped(self, hidden: Tensor) -> Iterator[None]:
        """While the network runs, its lower layers do nothing, and the lowest that moves is handed `hidden`
        [R, W, d].
        """

        def put(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

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
        """Give the file back."""
        self.path.unlink(missing_ok=True)


def _unchanged(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def keep(policy: Any, batch: Batch, path: Path, tokens: int) -> Frozen | str:
    """The store for `tokens` tokens, or why there is none to be had. batch: some rows, to see where the tuner
    reaches.
    """
    model, attached, arch = policy.model, policy.attached, policy.architecture
    if not hasattr(arch, "laid_out"):
        return f"architecture '{arch.name}' knows no frozen layers"
    if attached.virtual or getattr(arch, "neftune_noise_alpha", 0):
        return "what is read changes from step to step"
    config = model.config.get_text_config()
    lists = [
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers
    ]
    if len(lists) != 1:
        return "its layers are not one list"
    first, width, dtype = _reach(policy, lists[0], batch)
    if first < 1:
        return "the tuner reaches down to the lowest layer"
    upper = {m for layer in lists[0][first:] for m in layer.modules()}
    attention = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    if any(isinstance(m, nn.Dropout) and m.p for m in model.modules() if m not in upper) or any(
        getattr(config, n, 0) for n in attention
    ):
        return "dropout changes what its lower layers say from step to step"
    bytes_each = width * dtype.itemsize
    room = min(tokens, min(LIMIT, shutil.disk_usage(path.parent).free // 2) // bytes_each)
    if room < 1:
        return "there is no room on the disk"
    path.unlink(missing_ok=True)
    table = torch.from_file(str(path), shared=True, size=room * width, dtype=dtype).view(room, width)
    made = Frozen(path, lists[0], first, table)
    if not _same(policy, batch, made):
        made.close()
        return "what is kept is not what the network computes"
    return made


@torch.no_grad()
def _same(policy: Any, batch: Batch, made: Frozen) -> bool:
    """Does the network answer as it does without?"""
    model, attached, arch = policy.model, policy.attached, policy.architecture
    with eval_mode(model):
        want = arch.forward(model, attached, batch).logprobs
        if made.states(arch, model, attached, batch, fill=True) is None:
            return True  # no room even for these
        attached.frozen = made
        try:
            got = arch.forward(model, attached, batch).logprobs
        finally:
            attached.frozen = None
    return float((got - want).abs().mean()) <= tolerance(model)


def _reach(policy: Any, layers: nn.ModuleList, batch: Batch) -> tuple[int, int, torch.dtype]:
    """The lowest layer that moves, or whose input does: by asking autograd. -1 where layers answer with more
    than states.
    """
    wants: list[bool] = []
    plain: list[bool] = []
    seen: list[Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        wants.append(seen[-1].requires_grad)

    moving = [p for p in policy.attached.parameters().values() if p.is_floating_point()]
    was = [p.requires_grad for p in moving]
    hooks = [
        h
        for m in layers
        for h in (
            m.register_forward_pre_hook(before, with_kwargs=True),
            m.register_forward_hook(lambda m, i, o: plain.append(torch.is_tensor(o))),
        )
    ]
    try:
        for p in moving:  # tuners that move different layers in turn
            p.requires_grad_(True)
        with torch.enable_grad():
            policy.architecture.forward(policy.model, policy.attached, batch)
    finally:
        for p, before_it in zip(moving, was, strict=True):
            p.requires_grad_(before_it)
        for hook in hooks:
            hook.remove()
    n = len(layers)  # of the first pass, if there were several
    # inputs that nothing moving has touched: the last of them enters the first that moves
    frozen = sum(not w for w in wants[:n])
    whole = len(wants) % n == 0 and all(plain) and wants[:n] == sorted(wants[:n])
    return (frozen - 1 if whole else -1), seen[0].shape[-1], seen[0].dtype


def trees(batch: Batch) -> list[Batch] | None:
    """Each root with what continues it, as a batch of its own; None where trees are not one after the other."""
    parents = batch.parent.tolist()
    roots = [s for s, p in enumerate(parents) if p < 0]
    ends = [*roots[1:], len(parents)]
    if any(
        p >= 0 and not root <= p for root, end in zip(roots, ends, strict=True) for p in parents[root:end]
    ):
        return None
    starts = torch.tensor([0, *batch.sizes]).cumsum(0).tolist()
    out = []
    for root, end in zip(roots, ends, strict=True):
        own = slice(starts[root], starts[end])
        parent = torch.tensor([p - root if p >= 0 else -1 for p in parents[root:end]])
        asked = torch.zeros(starts[end] - starts[root], dtype=torch.bool, device=batch.ids.device)
        out.append(
            replace(
                batch,
                ids=batch.ids[own],
                labels=batch.labels[own],
                supervised=asked,
                segment=batch.segment[own] - root,
                parent=parent.to(batch.ids.device),
                completion=batch.completion[:0],
                group=batch.group[:0],
                rows=[],
                read={},
                metrics={},
            )
        )
    return out


def _key(tree: Batch) -> bytes:
    told = (
        torch.cat(
            [torch.tensor([len(tree.parent)], device=tree.ids.device), tree.parent, tree.segment, tree.ids]
        )
        .cpu()
        .numpy()
        .tobytes()
    )
    return hashlib.blake2b(told, digest_size=16).digest()
