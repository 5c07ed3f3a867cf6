"""Checkpoints of a run: written whole, read back bit for bit, and resumed from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.storage import files

DRAW = "draw.jsonl"  # rows of the current draw
FORMER_DRAW = "held.jsonl"  # as version 0.1 called it
WINDOW = 2**28  # bytes of a file that are mapped at a time while it is read back


@dataclass
class Checkpoint:
    """A moment of a run."""

    tensors: dict[str, Tensor]  # what is trained
    state: dict  # the optimizer's, nested: parameter group -> ... -> tensor or number
    step: int
    draw: list[dict] | None  # rows of the current draw, where they outlive a step
    totals: dict  # tokens, seconds and so on, so far


def paths(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if path.suffix == "" and (path / "state.json").is_file():
            whole.append(path)
    return sorted(whole, key=lambda path: int(path.name.split("-")[1]))


def save(folder: Path, moment: Checkpoint, limit: int) -> Path:
    """folder/checkpoint-N, after which the oldest beyond `limit` are deleted. Every tensor is read back and
    compared. Raises DiskError, and RuntimeError where the file does not hold what was written.
    """
    path = folder / f"checkpoint-{moment.step}"
    state, leaves = flatten(moment.state)
    with files.new_folder(path) as beside:
        save_tensors(moment.tensors, beside / "tensors.safetensors")
        save_tensors(state, beside / "optimizer.safetensors")
        if moment.draw is not None:
            files.write_rows(beside / DRAW, moment.draw)
        meta = {
            "step": moment.step,
            "draw": moment.draw is not None,
            "totals": moment.totals,
            "optimizer": leaves,
        }
        files.write_json(beside / "state.json", meta)
    for old in paths(folder)[:-limit]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load(path: Path) -> Checkpoint:
    from safetensors.torch import load_file

    meta = read_meta(path)
    tensors = load_file(str(path / "tensors.safetensors"))
    state = unflatten(load_file(str(path / "optimizer.safetensors")), meta["optimizer"])
    draw = None
    if meta["draw"]:
        draw = files.read_rows(draw_file(path))
    return Checkpoint(tensors, state, meta["step"], draw, meta["totals"])


def read_meta(path: Path) -> dict:
    """All of a checkpoint but its tensors: step, totals, numbers of the optimizer's state."""
    meta = files.read_json(path / "state.json")
    if "held" in meta:
        meta["draw"] = meta.pop("held")  # as version 0.1 called it
    return meta


def draw_file(path: Path) -> Path:
    """Where the rows of a checkpoint's draw are."""
    former = path / FORMER_DRAW
    return former if former.is_file() else path / DRAW


def flatten(tree: Mapping, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A nested mapping -> its tensors and its other leaves, by path."""
    tensors: dict[str, Tensor] = {}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{str(key).replace('|', '||')}"
        if isinstance(value, Mapping):
            inner_tensors, inner_leaves = flatten(value, path + " | ")
            tensors |= inner_tensors
            leaves |= inner_leaves
        elif torch.is_tensor(value):
            tensors[path] = value
        else:
            leaves[path] = value
    return tensors, leaves


def unflatten(tensors: Mapping[str, Tensor], leaves: Mapping[str, Any]) -> dict:
    """The nested mapping that `flatten` was given."""
    tree: dict = {}
    for path, value in (*tensors.items(), *leaves.items()):
        *above, last = [part.replace("||", "|") for part in path.split(" | ")]
        branch = tree
        for part in above:
            branch = branch.setdefault(part, {})
        branch[last] = value
    return tree


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file, read back and compared."""
    from safetensors.torch import save_file

    own: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.data_ptr() in addresses and value.numel():
            value = value.clone()  # safetensors refuses two names for one memory
        addresses.add(value.data_ptr())
        own[name] = value
    save_file(own, str(path))
    verify(own, path)


def verify(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Read a safetensors file back: every tensor must be there, bit for bit. Raises RuntimeError."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        missing = sorted(tensors.keys() - set(file.keys()))
    if missing:
        raise RuntimeError(f"{path} is missing {missing[0]} after saving")
    left = list(tensors.items())
    while left:
        read = 0
        # opened again for each window, or all of the file would be in memory at the end
        with safe_open(str(path), framework="pt") as file:
            while left and read < WINDOW:
                name, value = left.pop()
                if not _same(file.get_tensor(name), value.detach().cpu()):
                    raise RuntimeError(f"{path}: {name} differs from what was saved")
                read += value.nbytes


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: not a number equals itself here, and -0 is not 0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    views = []
    for tensor in (a.contiguous(), b.contiguous()):
        # of a single number a stride may be anything, and no view would be taken
        flat = tensor.as_strided((tensor.numel(),), (1,))
        views.append(flat.view(torch.uint8))
    return torch.equal(*views)
