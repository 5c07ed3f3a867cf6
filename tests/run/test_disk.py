"""What lies on disk: every bit of a checkpoint is checked, and damage is a sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import luthier
from helpers.runs import weights
from luthier.errors import Damaged
from luthier.report.console import Callback
from luthier.storage import checkpoints

FILES = ["manifest.json", "optimizer.safetensors", "state.json", "tensors.safetensors"]


class Stop(Callback):
    """Ends a run in mid-air after a step."""

    def __init__(self, step: int, act=None):
        super().__init__()
        self.at, self.act = step, act

    def step(self, log):
        if log["step"] == self.at:
            if self.act is None:
                raise KeyboardInterrupt
            self.act()


def interrupted(recipe: dict, folder: Path, step: int = 5) -> Path:
    """A run that was stopped after a step: with save_steps 2, checkpoints 2 and 4 are there."""
    with pytest.raises(KeyboardInterrupt):
        luthier.tune(recipe, folder=folder, callback=Stop(step))
    return folder


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    from helpers.rows import recipe_of

    recipe = recipe_of(tiny) | {"tuner": "lora", "evaluate": ["loss"]}
    folder = tmp_path_factory.mktemp("stopped")
    return recipe, interrupted(recipe, folder / "run"), luthier.tune(recipe, folder=folder / "whole")


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def test_one_flipped_bit_anywhere_in_a_checkpoint_is_noticed(stopped, tmp_path):
    """Every bit of the small files, and one in a few hundred of the tensors'."""
    newest = checkpoints.paths(stopped[1])[-1]
    assert sorted(path.name for path in newest.iterdir()) == FILES
    for path in newest.iterdir():
        bits = path.stat().st_size * 8
        whole = path.read_bytes()
        for bit in range(0, bits, max(1, bits // 3000)):
            flip(path, bit)
            assert checkpoints.damage(newest) is not None, f"bit {bit} of {path.name}"
            path.write_bytes(whole)
    assert checkpoints.damage(newest) is None


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint_falls_back_and_ends_alike(stopped, tmp_path, name):
    recipe, source, whole = stopped
    run = Path(shutil.copytree(source, tmp_path / "run"))
    flip(run / "checkpoint-4" / name, 12345)
    with pytest.raises(Damaged, match="checkpoint-4 cannot be used"):
        luthier.load(run)
    report = luthier.tune(recipe, folder=run)
    assert any("checkpoint-4 cannot be used" in note for note in report.notes)
    assert any(note.startswith("resuming from checkpoint-2") for note in report.notes)
    assert report.losses == whole.losses
    a, b = weights(run), weights(whole.folder)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_run_whose_checkpoint_is_damaged_is_made_again(stopped, tmp_path):
    recipe, _, whole = stopped
    run = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    flip(run / "checkpoint-6" / "tensors.safetensors", 9999)
    with pytest.raises(Damaged):
        luthier.load(run)
    assert luthier.tune(recipe, folder=run).losses == whole.losses
    assert checkpoints.damage(run / "checkpoint-6") is None and luthier.load(run)
