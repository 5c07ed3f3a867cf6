"""Checkpoints of a run: written whole, read back bit for bit, and resumed from."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.errors import Damaged
from luthier.storage import files, manifest

STATE = "state.json"  # written last but for the manifest: with it a checkpoint is one
DRAW = "draw.jsonl"  # rows of the current draw
WAITING = "waiting.jsonl"  # {"draw", "row"}: rows of the draws that were sampled ahead
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
    waiting: list[list[dict]] = field(default_factory=list)  # rows of each draw that was sampled ahead


def paths(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return [path for path in numbered(folder) if (path / STATE).is_file()]


def numbered(folder: Path) -> list[Path]:
    """Every folder that is called as a checkpoint is, oldest first."""
    steps = []
    for path in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            steps.append((int(match[1]), path))
    return [path for _, path in sorted(steps)]


def newest_intact(folder: Path, warn: Callable[[str], object]) -> Path | None:
    """The last checkpoint whose files are all as they were written; None where there is none.

    warn: hears of each later one what is wrong with it.
    """
    for path in reversed(numbered(folder)):
        why = damage(path)
        if why is None:
            return path
        warn(f"{path} cannot be used: {why}")
    return None


def load_newest(folder: Path) -> Checkpoint | None:
    """The last checkpoint of a run; None where it has none. Raises Damaged: an earlier one would be another
    model.
    """
    every = numbered(folder)
    if not every:
        return None
    if why := damage(every[-1]):
        raise Damaged(
            f"{every[-1]} cannot be used: {why}; run the recipe of {folder} again: it goes on from the"
            " checkpoint before"
        )
    return load(every[-1])


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, for a sentence; None where nothing is."""
    if not (path / STATE).is_file():
        return f"{STATE} is missing"
    if why := manifest.damage(path):
        return why
    if (path / manifest.MANIFEST).is_file():
        return None
    try:  # version 0.1 wrote no checksums: whatever can be read is taken for intact
        load(path)
    except Damaged as error:
        return str(error)
    return None


def save(folder: Path, moment: Checkpoint, limit: int, run_files: Iterable[Path] = ()) -> Path:
    """folder/checkpoint-N, after which the oldest beyond `limit` are deleted. Every tensor is read back and
    compared.

    run_files: files of the run whose checksums it holds beside those of its own. Raises DiskError, and
    RuntimeError where the file does not hold what was written.
    """
    path = folder / f"checkpoint-{moment.step}"
    state, leaves = flatten(moment.state)
    with files.new_folder(path) as beside:
        save_tensors(moment.tensors, beside / "tensors.safetensors")
        save_tensors(state, beside / "optimizer.safetensors")
        if moment.draw is not None:
            files.write_rows(beside / DRAW, moment.draw)
        if moment.waiting:
            waiting = []
            for number, rows in enumerate(moment.waiting):
                waiting += [{"draw": number, "row": row} for row in rows]
            files.write_rows(beside / WAITING, waiting)
        meta = {
            "step": moment.step,
            "draw": moment.draw is not None,
            "waiting": len(moment.waiting),
            "totals": moment.totals,
            "optimizer": leaves,
        }
        files.write_json(beside / STATE, meta)
        manifest.write(beside, run_files)
    prune(folder, limit)
    return path


def prune(folder: Path, limit: int) -> None:
    """Delete all but the last checkpoints."""
    for old in paths(folder)[:-limit]:
        remove(old)


def remove(path: Path) -> None:
    """Delete a checkpoint. It goes under another name first: half deleted it is a leftover, and no
    checkpoint.
    """
    if path.is_symlink():
        path.unlink()
        return
    beside = path.with_name(path.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    os.replace(path, beside)
    shutil.rmtree(beside, ignore_errors=True)


def load(path: Path) -> Checkpoint:
    """Raises Damaged where a file is not as it was written."""
    if why := manifest.damage(path):
        raise Damaged(f"{path} cannot be used: {why}")
    meta = read_meta(path)
    tensors = load_tensors(path / "tensors.safetensors")
    state = unflatten(load_tensors(path / "optimizer.safetensors"), meta["optimizer"])
    draw = None
    if meta["draw"]:
        draw = files.read_rows(draw_file(path))
    waiting: list[list[dict]] = [[] for _ in range(meta.get("waiting", 0))]
    if waiting:
        for line in files.read_rows(path / WAITING):
            waiting[line["draw"]].append(line["row"])
    return Checkpoint(tensors, state, meta["step"], draw, meta["totals"], waiting)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises Damaged where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        files.open_regular(path).close()
        return load_file(str(path))
    except (OSError, SafetensorError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise Damaged(f"{path} is missing or is no safetensors file ({reason})") from None


def read_meta(path: Path) -> dict:
    """All of a checkpoint but its tensors: step, totals, numbers of the optimizer's state. Raises Damaged."""
    meta = files.read_object(path / STATE, step=int, totals=dict, optimizer=dict)
    if "held" in meta:
        meta["draw"] = meta.pop("held")  # as version 0.1 called it
    if not isinstance(meta.get("draw"), bool):
        raise Damaged(f"{path / STATE} is damaged: draw is missing")
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
