"""What a role that never changes says of a row is computed once: its log-probabilities lie in a file, and
later epochs read them.

A row is known by its tokens and by which of them are asked about. The file stays with a run that is stopped,
so that what was computed before is what goes on to be used. Numbers are those of the batch a row was first
read in: in later epochs a plain run would compute them in other company, so the two differ by rounding there,
and by nothing in the first epoch.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from luthier.model.batch import Batch
from luthier.model.policy import Policy
from luthier.train.hidden_cache import LIMIT, trees

# words before a row's numbers: how many there are, a checksum, and the 128 bits by which the row is known
HEAD = 6


class Said:
    """A memory-mapped file of records, each complete or not there: a torn one ends it."""

    def __init__(self, path: Path, room: int, what: str):
        """room: rows and numbers, as `wanted` counts them. what: all that the numbers depend on beside the
        rows.
        """
        self.path, mark = (
            path,
            np.frombuffer(hashlib.blake2b(what.encode(), digest_size=16).digest(), np.int32),
        )
        size = len(mark) + room
        if not path.is_file() or path.stat().st_size != 4 * size:
            path.unlink(missing_ok=True)
            with open(path, "wb") as file:
                file.truncate(4 * size)  # zeros, which take no disk until they are written
        self.words = np.memmap(path, np.int32, "r+", shape=(size,))
        if not np.array_equal(self.words[: len(mark)], mark):
            self.words[:] = 0
            self.words[: len(mark)] = mark
        self.places: dict[bytes, slice] = {}
        self.used = len(mark)
        while self.used + HEAD <= size and (n := int(self.words[self.used])) > 0:
            values = slice(self.used + HEAD, self.used + HEAD + n)
            if values.stop > size or self.words[self.used + 1] != checksum(self.words[values]):
                break
            self.places[self.words[self.used + 2 : self.used + HEAD].tobytes()] = values
            self.used = values.stop

    def find(self, keys: Sequence[bytes]) -> Tensor | None:
        """[T] the numbers of all these rows; None where one of them is not known."""
        if not keys or any(key not in self.places for key in keys):
            return None
        return torch.from_numpy(
            np.concatenate([self.words[self.places[key]] for key in keys]).view(np.float32)
        )

    def keep(self, keys: Sequence[bytes], counts: Sequence[int], values: Tensor) -> None:
        """values [T], counts of them for each row; what is known stays as it is, and what finds no room is
        left out.
        """
        for key, own in zip(keys, values.detach().cpu().split(list(counts)), strict=True):
            stop = self.used + HEAD + len(own)
            if key in self.places or not len(own) or stop > len(self.words):
                continue
            place = slice(self.used + HEAD, stop)
            self.words[place] = own.numpy().view(np.int32)
            self.words[self.used + 1] = checksum(self.words[place])
            self.words[self.used + 2 : self.used + HEAD] = np.frombuffer(key, np.int32)
            self.words[self.used] = len(own)  # last: from here on it is there
            self.places[key], self.used = place, stop

    def close(self) -> None:
        """Give the file back."""
        self.path.unlink(missing_ok=True)


def checksum(words: np.ndarray) -> np.int32:
    return np.frombuffer(hashlib.blake2b(words.tobytes(), digest_size=4).digest(), np.int32)[0]


def wanted(rows: int, supervised: float) -> int:
    """Words for so many rows with so many questions in all."""
    return rows * HEAD + round(supervised)


class Known(Policy):
    """A role whose log-probabilities are kept. Asked for more than these, or about altered rows, the network
    itself answers.
    """

    def __init__(self, role: Policy, said: Said):
        super().__init__(role.architecture, role.model, role.attached, role.role, role.inside)
        self.said = said

    def logprobs(self, batch: Batch) -> Tensor:
        alone = None if batch.altered or self.role in batch.read else trees(batch)
        if alone is None:
            return super().logprobs(batch)
        marks = batch.supervised.split([len(tree.ids) for tree in alone])
        keys = [known_by(tree, asked) for tree, asked in zip(alone, marks, strict=True)]
        found = self.said.find(keys)
        if found is not None:
            return found.to(batch.ids.device)
        said = super().logprobs(batch)
        if said.dtype == torch.float32:
            self.said.keep(keys, [int(asked.sum()) for asked in marks], said)
        return said


def known_by(tree: Batch, asked: Tensor) -> bytes:
    shape = torch.tensor([len(tree.parent)], device=tree.ids.device)
    told = (
        torch.cat([shape, tree.parent, tree.segment, tree.labels, tree.ids, asked.long()])
        .cpu()
        .numpy()
        .tobytes()
    )
    return hashlib.blake2b(told, digest_size=16).digest()


def keep(role: Policy, path: Path, room: int, what: str) -> Known | str:
    """The role, remembering; or why it cannot."""
    if 4 * room > min(LIMIT, shutil.disk_usage(path.parent).free // 2):
        return f"its numbers would take {4 * room / 2**30:.1f} GB of disk"
    return Known(role, Said(path, room, f"{what} {next(role.model.parameters()).dtype} {role.architecture}"))
