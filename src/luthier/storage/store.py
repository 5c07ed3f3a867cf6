"""What lies on disk: models, the run folder, checkpoints. Written beside and renamed, so a kill leaves the
old or the new.

A run folder: recipe.yaml (resolved), checkpoint-N/, metrics.jsonl, report.json, report.html, README.md,
quarantine.jsonl, rows.jsonl (where stages made rows), and what was tuned at the root.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.compat.lazy_imports import import_models
from luthier.errors import RecipeError
from luthier.registry import did_you_mean

QUANTIZATION = "quantization.json"  # beside an adapter: what its base's weights were kept in

# ---------------------------------------------------------------------------------------------- models


def resolve_model(name: str) -> str:
    """practice:NAME -> its folder; a folder or hub name stays as it is. Raises RecipeError where nothing is
    there.
    """
    if name.startswith("practice:"):
        from luthier import toy as practice

        known = name.removeprefix("practice:")
        if known not in practice.models():
            raise RecipeError(f"there is no practice model '{known}'{did_you_mean(known, practice.models())}")
        return str(practice.path(known))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RecipeError(
                f"{name} is a folder without config.json: not a transformers model" + _adapter_hint(path)
            )
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        near = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise RecipeError(f"model: there is no folder {name}{did_you_mean(path.name, near)}")
    return name


def _adapter_hint(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return "; it holds an adapter: give its base as `model:` and the folder as `start:`"
    return ""


def model_config(name: str):
    """The transformers config of a model, without its weights."""
    import_models()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model {name} cannot be loaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


# ---------------------------------------------------------------------------------------------- writing


class DiskError(RecipeError):
    """The disk is full or may not be written. What was there before is intact."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failing disk into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path if path.exists() else path.parent).free
            raise DiskError(
                f"the disk of {path} is full ({free / 2**20:.0f} MB free); what was saved before is intact:"
                " free some space and run the same command again"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise DiskError(f"{path} cannot be written ({error.strerror}); give another output_dir") from None
        raise
    except Exception as error:  # safetensors reports a full disk as its own error
        if "No space left" in str(error) or "os error 28" in str(error):
            raise DiskError(
                f"the disk of {path} is full; what was saved before is intact: free some space and run the"
                " same command again"
            ) from None
        raise


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A folder for oneself, made if it is not there: while one process has it, another is refused. The lock's
    file says whose it is.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a", encoding="ascii")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(f"another process is running in {folder}") from None
        with disk_errors(folder):
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # processes of one run may write the same at once
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=float) + "\n")


def write_rows(path: Path, rows: list[dict]) -> None:
    """jsonl."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in rows))


def read_rows(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when all of it is written."""
    beside = path.with_name(path.name + ".part")
    with disk_errors(path):
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir(parents=True)
            yield beside
            for file in beside.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as f:
                        os.fsync(f.fileno())
            old = path.with_name(path.name + ".old")
            if path.exists():
                os.replace(path, old)
            os.replace(beside, path)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


# ---------------------------------------------------------------------------------------------- checkpoints


@dataclass
class Checkpoint:
    """A moment of a run: what moves, the optimizer's state, the step, samples in use, running counts."""

    tensors: dict[str, Tensor]
    state: dict  # nested: site -> ... -> tensor or number
    step: int
    held: list[dict] | None  # rows of the current draw, where they outlive a step
    totals: dict  # tokens, seconds and so on, so far


def flatten(tree: Mapping, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A nested mapping -> its tensors and its other leaves, by path."""
    tensors: dict[str, Tensor] = {}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{str(key).replace('|', '||')}"
        if isinstance(value, Mapping):
            inner = flatten(value, path + " | ")
            tensors |= inner[0]
            leaves |= inner[1]
        elif torch.is_tensor(value):
            tensors[path] = value
        else:
            leaves[path] = value
    return tensors, leaves


def unflatten(tensors: Mapping[str, Tensor], leaves: Mapping[str, Any]) -> dict:
    out: dict = {}
    for path, value in (*tensors.items(), *leaves.items()):
        *above, last = [part.replace("||", "|") for part in path.split(" | ")]
        here = out
        for part in above:
            here = here.setdefault(part, {})
        here[last] = value
    return out


def save_checkpoint(folder: Path, made: Checkpoint, keep: int) -> Path:
    """folder/checkpoint-N, then the oldest beyond `keep` leave. Every tensor is read back and compared."""
    from safetensors.torch import save_file

    path = folder / f"checkpoint-{made.step}"
    state, leaves = flatten(made.state)
    with new_folder(path) as beside:
        _save_checked(save_file, made.tensors, beside / "tensors.safetensors")
        _save_checked(save_file, state, beside / "optimizer.safetensors")
        if made.held is not None:
            write_rows(beside / "held.jsonl", made.held)
        meta = {"step": made.step, "held": made.held is not None, "totals": made.totals, "optimizer": leaves}
        write_json(beside / "state.json", meta)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _save_checked(save_file: Any, tensors: dict[str, Tensor], path: Path) -> None:
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    shared: dict[int, str] = {}
    for k, v in tensors.items():  # safetensors refuses two names for one memory
        if v.data_ptr() in shared and v.numel():
            tensors[k] = v.clone()
        shared[v.data_ptr()] = k
    save_file(tensors, str(path))
    compare(tensors, path)


WINDOW = 2**28  # bytes of a file that are mapped at a time while it is read back


def compare(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Read a safetensors file back: every tensor must be there, bit for bit."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        missing = sorted(tensors.keys() - set(file.keys()))
    if missing:
        raise RuntimeError(f"{path} lacks {missing[0]} after saving")
    left = list(tensors.items())
    while left:
        read = 0
        # opened anew, or all of the file would be in memory at the end
        with safe_open(str(path), framework="pt") as file:
            while left and read < WINDOW:
                name, value = left.pop()
                if not _same(file.get_tensor(name), value.detach().cpu()):
                    raise RuntimeError(f"{path}: {name} was not saved as it is")
                read += value.nbytes


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(_bytes(a), _bytes(b))


def _bytes(t: Tensor) -> Tensor:
    t = t.contiguous()
    # of a single number a stride may be anything, and no view would be taken
    return t.as_strided((t.numel(),), (1,)).view(torch.uint8)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "state.json").is_file() and p.suffix == ""]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def load_meta(path: Path) -> dict:
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def load_checkpoint(path: Path) -> Checkpoint:
    from safetensors.torch import load_file

    meta = load_meta(path)
    state = unflatten(load_file(str(path / "optimizer.safetensors")), meta["optimizer"])
    held = read_rows(path / "held.jsonl") if meta["held"] else None
    return Checkpoint(load_file(str(path / "tensors.safetensors")), state, meta["step"], held, meta["totals"])
