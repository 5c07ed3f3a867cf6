"""What a tuner needs to go on in another library's checkpoint: a file beside that checkpoint's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

NAME = "tuner_state.safetensors"
ENTRIES = 64  # of every tensor that make the fingerprint of a moment


def write(folder: Path, memory: Mapping[str, Tensor], fingerprint: str) -> None:
    """memory: tensors that only training needs. fingerprint: of the weights that they belong to."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in memory.items()}
    save_file(tensors, str(folder / NAME), metadata={"weights": fingerprint})


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder; empty where it has no such file."""
    path = folder / NAME
    return load_file(str(path)) if path.is_file() else {}


def written_with(folder: Path) -> str | None:
    """The fingerprint of the weights that the file of a folder belongs to; None where there is no file."""
    path = folder / NAME
    if not path.is_file():
        return None
    with safe_open(str(path), framework="pt") as file:
        return (file.metadata() or {}).get("weights")


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Tells moments of a run apart, by a few entries of every weight."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        entries = weights[name].detach().flatten()[:ENTRIES].double().cpu()
        digest.update(name.encode())
        digest.update(entries.numpy().tobytes())
    return digest.hexdigest()
