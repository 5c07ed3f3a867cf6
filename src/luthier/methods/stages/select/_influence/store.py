"""Vectors of rows on disk: written as they come, read through the page cache, and reused by whoever asks for
the same rows under the same model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.errors import RecipeError


def digest_of(row: dict) -> str:
    """What a row's vector depends on: its prompt with its images or recordings, and its completions."""
    content = [row["prompt"], row.get("completions")]
    for name in ("images", "audios"):
        if row.get(name):
            content.append(row[name])
    text = json.dumps(content, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def fingerprint(policy: Any) -> str:
    """Of a network: its settings, all that trains, and a sample of each frozen tensor."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(str(getattr(policy.model.config, "to_diff_dict", dict)()).encode())
    trained = {id(p) for p in policy.attached.parameters().values()}
    for name, p in policy.model.named_parameters():
        values = p.detach().flatten()
        if id(p) not in trained:
            values = values[:: max(1, len(values) // 64)]
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class VectorStore:
    """Unit vectors in the order in which they came, and the digest of the row of each. A half-written end, as
    of a process that was killed, is cut off.

    folder: None holds them in memory. exact: in fp32 in the place of fp16.
    """

    def __init__(self, folder: Path | None, width: int, exact: bool = False):
        self.width, self.type = width, np.dtype(np.float32 if exact else np.float16)
        self.folder = folder
        self.places: dict[str, int] = {}
        self.blocks: list[np.ndarray] = []  # where there is no folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._open(folder)

    def _open(self, folder: Path) -> None:
        self.vectors, self.names = folder / "vectors.bin", folder / "rows.txt"
        for path in (self.vectors, self.names):
            path.touch()
        lines = self.names.read_text(encoding="ascii").split("\n")[:-1]
        size = self.width * self.type.itemsize
        count = min(len(lines), self.vectors.stat().st_size // size)
        with open(self.vectors, "r+b") as file:
            file.truncate(count * size)
        with open(self.names, "r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines[:count]))
        for place, line in enumerate(lines[:count]):
            self.places.setdefault(line, place)
        self.count = count

    def missing(self, rows: Sequence[dict]) -> list[dict]:
        """Rows without a vector, of equal ones the first."""
        out = {}
        for row in rows:
            name = digest_of(row)
            if name not in self.places:
                out.setdefault(name, row)
        return list(out.values())

    def add(self, rows: Sequence[dict], vectors: Tensor) -> None:
        """Vectors [G, width] of rows that are missing."""
        values = vectors.float().cpu().numpy().astype(self.type)
        names = [digest_of(row) for row in rows]
        first = len(self.places) if self.folder is None else self.count
        if self.folder is None:
            self.blocks.append(values)
        else:
            with open(self.vectors, "ab") as file:
                file.write(values.tobytes())
            with open(self.names, "a", encoding="ascii") as file:
                file.write("".join(name + "\n" for name in names))
            self.count += len(names)
        for place, name in enumerate(names):
            self.places.setdefault(name, first + place)

    def check_disk(self, count: int) -> None:
        """Raises RecipeError where so many further vectors do not fit on the disk."""
        need = count * self.width * self.type.itemsize
        if self.folder is None:
            return
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise RecipeError(
                f"the gradients of {count:,} rows take {need / 2**20:,.0f} MB, but {self.folder} has"
                f" {free / 2**20:,.0f} MB left; lower `dim`"
            )

    def table(self) -> np.ndarray:
        if self.folder is None:
            return np.concatenate(self.blocks)
        return np.memmap(self.vectors, self.type, "r", shape=(self.count, self.width))

    def products(self, rows: Sequence[dict], others: Tensor, block: int = 1024) -> Tensor:
        """[N, M] of the vectors of rows with others [M, width], in float64, some at a time."""
        return self.over(rows, lambda vectors: vectors.double() @ others.double().T, block)

    def over(self, rows: Sequence[dict], f: Callable[[Tensor], Tensor], block: int = 1024) -> Tensor:
        """f of the vectors [n, width] of some rows at a time, in fp32; the results one after the other."""
        table, out = self.table(), []
        for first in range(0, len(rows), block):
            places = [self.places[digest_of(row)] for row in rows[first : first + block]]
            out.append(f(torch.from_numpy(np.asarray(table[places], dtype=np.float32))))
        return torch.cat(out)
