"""Files that are there whole or not at all: written beside and renamed, so a kill leaves the old or the
new.

A run folder: recipe.yaml (resolved), checkpoint-N/, metrics.jsonl, report.json, report.html, README.md,
quarantine.jsonl, rows.jsonl (where stages made rows), dropped.jsonl (what they left out), failed.json (of a
run that failed), and what was tuned at the root.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from luthier.errors import Damaged, DiskError, RecipeError, quoted

QUANTIZATION = "quantization.json"  # beside an adapter: what its base's weights were kept in

LOCK = ".lock"
# what is being written, what was moved aside, and files of safetensors under their first names
LEFTOVER = re.compile(r"checkpoint-\d+\.(part|old)|(.+\.)?\d+\.part|\.tmp\w{6}")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENXIO),
    *(errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.ENOLCK, errno.ESTALE),
)
# as safetensors, which is written in Rust, reports them
FULL_AS_TEXT = tuple(f"os error {number}" for number in FULL) + ("No space left",)
MAX_NAME = 255  # bytes of the name of a folder
MAX_READ = 1 << 28  # bytes of a file that is read as a whole
LOCK_ATTEMPTS = 5
MAX_LINE = 1 << 20  # bytes of a line of a log


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failing disk into a DiskError."""
    intact = "everything saved so far is intact; free some space and run the same command again"
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise DiskError(f"a file of {path} may not become so large (ulimit -f); {intact}") from None
        if error.errno in FULL:
            place = path if path.exists() else path.parent
            free = shutil.disk_usage(place).free / 2**20
            raise DiskError(f"the disk of {path} is full ({free:.0f} MB free); {intact}") from None
        if error.errno in FORBIDDEN:
            raise DiskError(f"{path} cannot be written ({error.strerror}); give another output_dir") from None
        raise
    except Exception as error:
        # safetensors reports a full disk as its own error, without a number
        if any(words in str(error) for words in FULL_AS_TEXT):
            raise DiskError(f"the disk of {path} is full, or limited (ulimit -f); {intact}") from None
        raise


@dataclass(frozen=True)
class FolderLock:
    """The lock of a folder that this process holds."""

    folder: Path
    descriptor: int  # of the lock's file

    def check(self) -> None:
        """Raises RecipeError where the folder or its lock was removed, or another lock lies there: whoever
        writes on might write into another run.
        """
        if not _is_open_file(self.folder / LOCK, self.descriptor):
            raise RecipeError(
                f"{self.folder} or the lock in it was removed while this process was using it, so it stops;"
                " what it had saved is no longer there or may belong to another run",
                "folder_removed",
            )


def check_folder_name(folder: Path) -> None:
    """Raise RecipeError for what no folder can be called."""
    name = str(folder)
    if "\0" in name or any("\ud800" <= character <= "\udfff" for character in name):
        raise RecipeError(f"output_dir: {quoted(name)} cannot be the name of a folder")
    for part in folder.parts:
        if len(os.fsencode(part)) > MAX_NAME:
            raise RecipeError(f"output_dir: {quoted(part)} is longer than the {MAX_NAME} bytes of a name")


@contextmanager
def exclusive(folder: Path) -> Iterator[FolderLock]:
    """A folder for oneself, made if it is not there: while one process has it, another is refused. The lock's
    file holds the process id. What a killed process left half written in the folder is cleared.
    """
    try:
        with disk_errors(folder):
            lock = _open_lock(folder)
    except (FileNotFoundError, NotADirectoryError) as error:  # below /proc, for one
        raise DiskError(f"{folder} cannot be made ({error.strerror}); give another output_dir") from None
    with lock:
        if not _take(lock):
            raise RecipeError(f"another process is using {folder}", "busy")
        lease = FolderLock(folder, lock.fileno())
        lease.check()  # it may have been removed between the two
        with disk_errors(folder):
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            remove_leftovers(folder)
        try:
            yield lease
        finally:
            lock.truncate(0)


def _open_lock(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged(f"{folder / LOCK} is not a file; remove it and run the same command again")
    return open(descriptor, "r+", encoding="ascii")


def _take(lock: Any) -> bool:
    """Whether the lock could be taken. Who only asks whether it is held holds it for a moment."""
    for attempt in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if attempt + 1 < LOCK_ATTEMPTS:
                time.sleep(0.02)
    return False


def lock_holder(folder: Path) -> int | None:
    """The process that has a folder for itself; None where none has. Its number stands in the lock's file,
    but counts only as long as the lock is held.
    """
    try:
        with open_regular(folder / LOCK) as lock:
            number = lock.read(20)
            if not number.isdigit() or not 1 < int(number) < 2**31:
                return None
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(number)
            return None
    except (Damaged, OSError):
        return None


def _is_open_file(path: Path, descriptor: int) -> bool:
    """Whether a path leads to the file that is open under this descriptor."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _written_now(path: Path) -> bool:
    """Does a live process (another one of the same run) write this file? Its name holds the process id."""
    writer = re.search(r"(\d+)\.part$", path.name)
    if writer is None or path.name.startswith("checkpoint-") or int(writer[1]) == os.getpid():
        return False
    try:
        os.kill(int(writer[1]), 0)  # signal 0 asks, and sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's process
        return True
    return True


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what a killed process left half written in a folder; their names. A folder that was moved aside
    to make room for one that never came is put back.
    """
    removed = []
    for path in sorted(folder.iterdir()):
        if not LEFTOVER.fullmatch(path.name) or _written_now(path):
            continue
        former = path.with_suffix("")
        if path.suffix == ".old" and not former.exists():
            os.replace(path, former)
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path.name)
    return removed


def settle(folder: Path) -> None:
    """Files of a folder as the user's umask has them, and on the disk: other libraries write some for the
    owner alone.
    """
    allowed = _permissions(folder)
    for path in (*folder.rglob("*"), folder):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) == 0o600:
            path.chmod(allowed)
        _sync(path)


def _permissions(folder: Path) -> int:
    """With which permissions a new file appears in a folder: asked of one, since reading the umask changes it
    for every thread.
    """
    path = folder / f"{os.getpid()}.part"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        path.unlink()


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's list of files, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(path: Path, size: int) -> bool:
    """A new file of so many bytes that the disk has for it; whether it has. A file that is mapped into memory
    and only seems to be there ends the process where the disk is full.
    """
    try:
        with open(path, "wb") as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that does not tell
            return True
        path.unlink(missing_ok=True)
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Whole or not at all. Raises DiskError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all. Raises DiskError."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # processes of one run may write the same at once
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=float) + "\n")


def open_regular(path: Path) -> BinaryIO:
    """A file to be read as bytes. Raises Damaged where there is none: a folder, a pipe or a device in its
    place is none either, and nobody waits for a pipe.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged(f"{path} is not a file")
    return open(descriptor, "rb")


def read_text(path: Path, limit: int = MAX_READ) -> str:
    """The text of a file. limit: bytes. Raises Damaged where it is missing, larger, or no text."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise Damaged(f"{path} is larger than {limit >> 20:,} MB")
        try:
            return file.read(limit).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise Damaged(f"{path} is damaged and cannot be read as text ({reason})") from None


def read_json(path: Path) -> Any:
    """Raises Damaged where the file is missing or is no JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if text else "it is empty"
        raise Damaged(f"{path} is damaged and cannot be read as JSON ({reason})") from None


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a log, one after the other; what is longer than a line of a log comes in pieces. Raises
    Damaged where there is no file.
    """
    with open_regular(path) as file:
        while line := file.readline(MAX_LINE):
            yield line


def read_object(path: Path, **types: Any) -> dict[str, Any]:
    """A JSON object. types: keys that it must have, and of which types. Raises Damaged."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise Damaged(f"{path} is damaged: it holds a {type(value).__name__}, not an object")
    for key, kind in types.items():
        if not isinstance(value.get(key), kind):
            raise Damaged(f"{path} is damaged: {key} is missing or of another type")
    return value


def write_rows(path: Path, rows: list[dict]) -> None:
    """A line of JSON for each row."""
    lines = []
    for row in rows:
        lines.append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    write_text(path, "".join(lines))


def read_rows(path: Path) -> list[dict]:
    """Raises Damaged where the file is missing, or a line is no JSON object."""
    rows = []
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    rows.append(json.loads(line))
    except (OSError, ValueError, RecursionError):
        raise Damaged(f"{path} is damaged: line {len(rows) + 1} cannot be read") from None
    if not all(isinstance(row, dict) for row in rows):
        raise Damaged(f"{path} is damaged: it holds lines that are no rows")
    return rows


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when all of it is written. Raises DiskError."""
    beside = path.with_name(path.name + ".part")
    with disk_errors(path):
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir(parents=True)
            yield beside
            settle(beside)
            old = path.with_name(path.name + ".old")
            if path.exists():
                os.replace(path, old)
            os.replace(beside, path)
            _sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
