"""Log-probabilities of a role that never changes: computed once for each row, kept in a file, and read in
later epochs.

A row is stored under its tokens and which of them are supervised. The file stays with a run that is stopped,
so that it goes on with the same numbers. These are those of the batch a row was first read in: in later
epochs a run without the cache would compute them in other batches, so the two differ by rounding there, and
by nothing in the first epoch.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from luthier.errors import DiskError
from luthier.model.batch import Batch
from luthier.model.policy import Policy
from luthier.storage import files
from luthier.train.hidden_cache import LIMIT, digest, trees

# words before a row's numbers: how many there are, a checksum, and the 128 bits of its key
HEAD = 6


class LogprobCache:
    """A memory-mapped file of records, each complete or not there: a torn one ends it."""

    def __init__(self, path: Path, room: int, about: str):
        """room: 32-bit words, as `words_needed` counts them. about: all that the numbers depend on beside the
        rows; a file about something else is emptied.
        """
        self.path = path
        self.slices: dict[bytes, slice] = {}  # key of a row -> its numbers in the file
        mark = np.frombuffer(hashlib.blake2b(about.encode(), digest_size=16).digest(), np.int32)
        size = len(mark) + room
        if not path.is_file() or path.stat().st_size != 4 * size:
            path.unlink(missing_ok=True)
            if not files.reserve(path, 4 * size):
                raise DiskError(f"the disk of {path} has no room for {4 * size / 2**20:,.0f} MB")
        self.words = np.memmap(path, np.int32, "r+", shape=(size,))
        if not np.array_equal(self.words[: len(mark)], mark):
            self.words[:] = 0
            self.words[: len(mark)] = mark
        self.used = len(mark)
        self._index()

    def _index(self) -> None:
        """List the records of the file, up to the first that is torn."""
        size = len(self.words)
        while self.used + HEAD <= size and (n := int(self.words[self.used])) > 0:
            head = self.words[self.used : self.used + HEAD]
            values = slice(self.used + HEAD, self.used + HEAD + n)
            if values.stop > size or head[1] != checksum(self.words[values]):
                return
            self.slices[head[2:].tobytes()] = values
            self.used = values.stop

    def find(self, keys: Sequence[bytes]) -> Tensor | None:
        """[T] the numbers of all these rows, one row after another; None where one of them is not stored."""
        if not keys or any(key not in self.slices for key in keys):
            return None
        words = np.concatenate([self.words[self.slices[key]] for key in keys])
        return torch.from_numpy(words.view(np.float32))

    def store(self, keys: Sequence[bytes], counts: Sequence[int], values: Tensor) -> None:
        """values [T], counts of them for each row. What is stored stays as it is, and what finds no room is
        left out.
        """
        for key, numbers in zip(keys, values.detach().cpu().split(list(counts)), strict=True):
            stop = self.used + HEAD + len(numbers)
            if key in self.slices or not len(numbers) or stop > len(self.words):
                continue
            record = slice(self.used + HEAD, stop)
            self.words[record] = numbers.numpy().view(np.int32)
            self.words[self.used + 1] = checksum(self.words[record])
            self.words[self.used + 2 : self.used + HEAD] = np.frombuffer(key, np.int32)
            self.words[self.used] = len(numbers)  # last: from here on the record is there
            self.slices[key], self.used = record, stop

    def close(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def checksum(words: np.ndarray) -> np.int32:
    return np.frombuffer(hashlib.blake2b(words.tobytes(), digest_size=4).digest(), np.int32)[0]


def words_needed(rows: int, supervised: float) -> int:
    """32-bit words for so many rows with so many supervised tokens in all."""
    return rows * HEAD + round(supervised)


class CachedPolicy(Policy):
    """A role whose log-probabilities are cached. For anything else, and for altered rows, the network itself
    answers.
    """

    def __init__(self, role: Policy, cache: LogprobCache):
        super().__init__(role.architecture, role.model, role.attached, role.role, role.context)
        self.cache = cache

    def logprobs(self, batch: Batch) -> Tensor:
        alone = None
        if not batch.altered and self.role not in batch.read:
            alone = trees(batch)
        if alone is None:
            return super().logprobs(batch)
        supervised = batch.supervised.split([len(tree.ids) for tree in alone])
        keys = list(map(row_key, alone, supervised))
        cached = self.cache.find(keys)
        if cached is not None:
            return cached.to(batch.ids.device)
        values = super().logprobs(batch)
        if values.dtype == torch.float32:
            self.cache.store(keys, [int(marks.sum()) for marks in supervised], values)
        return values


def row_key(tree: Batch, supervised: Tensor) -> bytes:
    """What a row is stored under: its tokens, its shape, and which tokens are supervised."""
    segments = torch.tensor([len(tree.parent)], device=tree.ids.device)
    return digest(segments, tree.parent, tree.segment, tree.labels, tree.ids, supervised.long())


def open_cache(role: Policy, path: Path, room: int, about: str) -> CachedPolicy | str:
    """The role with a cache of `room` words at `path`, or why there can be none. about: settings of the
    role.
    """
    if 4 * room > min(LIMIT, shutil.disk_usage(path.parent).free // 2):
        return f"they would take {4 * room / 2**30:.1f} GB of disk"
    dtype = next(role.model.parameters()).dtype
    try:
        return CachedPolicy(role, LogprobCache(path, room, f"{about} {dtype} {role.architecture}"))
    except DiskError as error:
        return str(error)
