"""Files of runs that are read: nobody waits for a pipe, reads a device, or builds what a few bytes mean."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys

import pytest

from luthier.errors import Damaged, RecipeError
from luthier.storage import files
from luthier.storage.bounded_yaml import read_yaml
from luthier.storage.layout import read_log


def make_pipe(path):
    os.mkfifo(path)


def make_huge(path):
    path.write_text("{}")
    os.truncate(path, 3 << 30)


ODD = {
    "a pipe": (make_pipe, "is not a file"),
    "a folder": (lambda path: path.mkdir(), "is not a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is not a file"),
    "a circle": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "nothing": (lambda path: path.symlink_to("nowhere"), "is missing"),
    "too much": (make_huge, "is larger than"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read as text"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_json_file(tmp_path, kind):
    make, words = ODD[kind]
    path = tmp_path / "x.json"
    make(path)
    with pytest.raises(Damaged, match=words):
        files.read_object(path)


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device", "too much"])
def test_what_is_no_recipe(tmp_path, kind):
    ODD[kind][0](tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError):
        read_yaml(tmp_path / "recipe.yaml")


def test_a_pipe_in_place_of_the_lock_is_refused(tmp_path):
    os.mkfifo(tmp_path / files.LOCK)
    with pytest.raises(Damaged, match="is not a file"), files.exclusive(tmp_path):
        pass


def test_a_line_of_a_log_without_end_is_no_entry(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n' + b"x" * (3 * files.MAX_LINE) + b'\n{"step": 2}\n'
    )
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]


def test_the_holder_of_a_lock_is_who_holds_it(tmp_path):
    (tmp_path / files.LOCK).write_text(str(os.getpid()))
    assert files.lock_holder(tmp_path) is None  # a number alone
    with files.exclusive(tmp_path):
        assert files.lock_holder(tmp_path) == os.getpid()
    with open(tmp_path / files.LOCK, "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert files.lock_holder(tmp_path) is None  # held, and nobody's number


def test_a_disk_that_has_no_room_is_known_beforehand(tmp_path):
    assert files.reserve(tmp_path / "small", 1000)
    assert not files.reserve(tmp_path / "large", 1 << 60) and not (tmp_path / "large").exists()


def test_whoever_has_a_folder_clears_what_a_kill_left(tmp_path):
    """A comparison and a search write into their own folder too, not only into those of their runs."""
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
    half = tmp_path / f"status.json.{int(process.stdout)}.part"
    half.write_text("{")
    with files.exclusive(tmp_path):
        assert not half.exists()
