"""What lies on disk: every bit of a checkpoint is checked, and damage is a sentence."""

from __future__ import annotations

import os
import random
import shutil
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import luthier
from helpers.rows import UNPAIRED, recipe_of
from helpers.runs import weights
from luthier.errors import Damaged, RecipeError
from luthier.report.console import Callback
from luthier.storage import checkpoints, files

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
def stopped(shallow, tmp_path_factory):
    recipe = recipe_of(shallow) | {"tuner": {"name": "lora", "r": 1}, "evaluate": ["loss"]}
    folder = tmp_path_factory.mktemp("stopped")
    return recipe, interrupted(recipe, folder / "run"), luthier.tune(recipe, folder=folder / "whole")


def flipped(whole: bytes, bit: int) -> bytes:
    content = bytearray(whole)
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    return bytes(content)


def flip(path: Path, bit: int) -> None:
    path.write_bytes(flipped(path.read_bytes(), bit))


def test_one_flipped_bit_anywhere_in_a_checkpoint_is_noticed(stopped, tmp_path):
    """Every bit of the small files, and one in a hundred or so of the tensors'."""
    newest = checkpoints.paths(stopped[1])[-1]
    assert sorted(path.name for path in newest.iterdir()) == FILES
    for path in newest.iterdir():
        bits = path.stat().st_size * 8
        whole = path.read_bytes()
        for bit in range(0, bits, max(1, bits // (3000 if path.suffix == ".json" else 600))):
            path.write_bytes(flipped(whole, bit))
            assert checkpoints.damage(newest) is not None, f"bit {bit} of {path.name}"
        path.write_bytes(whole)
    assert checkpoints.damage(newest) is None


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(stopped, tmp_path, monkeypatch):
    """A power cut after the renaming loses nothing: every file was waited for, and then the folder."""
    log, replace = [], os.replace
    waited = lambda descriptor: log.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "fsync", waited)
    monkeypatch.setattr(os, "replace", lambda old, new: (replace(old, new), log.append(Path(new))))
    luthier.tune(stopped[0] | {"max_steps": 1}, folder=tmp_path)
    place = log.index(tmp_path / "checkpoint-1")
    assert {path.name for path in log[:place] if path.parent.name == "checkpoint-1.part"} >= {*FILES}
    assert tmp_path in log[place:]


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


@pytest.mark.parametrize("name", ["run.json", "before.json", "metrics.jsonl"])
def test_damage_beside_the_checkpoints_is_told(stopped, tmp_path, name):
    recipe, source, whole = stopped
    run = Path(shutil.copytree(source, tmp_path / "run"))
    path = run / name
    if name == "run.json":
        path.write_text(path.read_text().replace(luthier.__version__, "0.3.0"))
    else:
        path.write_bytes(b"\x00" + path.read_bytes()[:-20])
    report = luthier.tune(recipe, folder=run)
    assert any(name in note for note in report.notes)
    assert report.before == whole.before and report.after == whole.after


def test_checkpoints_without_run_json_are_nobodys(stopped, tmp_path):
    """They were taken for this run's before, whatever they were of."""
    recipe, source, _ = stopped
    run = Path(shutil.copytree(source, tmp_path / "run"))
    (run / "run.json").unlink()
    with pytest.raises(Damaged, match="no run.json"):
        luthier.tune(recipe | {"learning_rate": 5e-3}, folder=run)
    luthier.tune(recipe | {"overwrite": True}, folder=run)


def test_leftovers_of_a_kill_of_a_plan_are_cleared(shallow, tmp_path):
    (tmp_path / "report.json.999999999.part").write_text("{")
    plan = [{"max_steps": 1}, {"max_steps": 1}]
    luthier.tune(recipe_of(shallow) | {"plan": plan}, folder=tmp_path)
    assert not list(tmp_path.glob("*.part")) and (tmp_path / "report.json").is_file()


def test_leftovers_of_a_kill_are_cleared(stopped, tmp_path):
    recipe, source, whole = stopped
    run = Path(shutil.copytree(source, tmp_path / "run"))
    for name in ("checkpoint-6.part", "checkpoint-2.old"):
        (run / name).mkdir()
        (run / name / "state.json").write_text("{}")
    for name in ("report.json.4711.part", ".tmpAb3dE6"):
        (run / name).write_text("half")
    os.replace(run / "checkpoint-4", run / "checkpoint-4.old")  # killed between two renames
    report = luthier.tune(recipe, folder=run)
    assert any(note.startswith("resuming from checkpoint-4") for note in report.notes)
    assert report.losses == whole.losses
    assert not [path.name for path in run.iterdir() if files.LEFTOVER.fullmatch(path.name)]


@pytest.mark.parametrize("lost", ["folder", "lock"])
def test_a_folder_removed_under_a_run_ends_it(base, tmp_path, lost):
    run = tmp_path / "run"

    def remove():
        if lost == "folder":
            shutil.rmtree(run)
        else:
            (run / ".lock").unlink()
            with files.exclusive(run):  # another process takes the folder
                pass

    with pytest.raises(RecipeError, match="was removed") as error:
        luthier.tune(base, folder=run, callback=Stop(3, remove))
    assert error.value.code == "folder_removed"
    assert run.exists() == (lost == "lock") and not (run / "failed.json").exists()


def test_another_base_is_refused(base, tmp_path):
    model = Path(shutil.copytree(base["model"], tmp_path / "model"))
    recipe = base | {"model": str(model), "tuner": "lora"}
    interrupted(recipe, tmp_path / "stopped")
    luthier.tune(recipe, folder=tmp_path / "run")
    luthier.load(tmp_path / "run")
    os.utime(model / "model.safetensors")  # another time alone is no other model
    luthier.load(tmp_path / "run")
    flip(model / "model.safetensors", 8 * (model / "model.safetensors").stat().st_size - 3)
    with pytest.raises(RecipeError) as error:
        luthier.load(tmp_path / "run")
    assert error.value.code == "base_changed"
    with pytest.raises(RecipeError) as error:
        luthier.tune(recipe, folder=tmp_path / "stopped")
    assert error.value.code == "base_changed"


def test_files_have_the_umask(base, tmp_path):
    luthier.tune(base | {"tuner": "lora"}, folder=tmp_path / "run")
    before = os.umask(0)
    os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~before, path


SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def test_other_micro_batches_go_on_with_the_same_rows(stopped, tmp_path):
    """4 x 1 -> 2 x 2: the run that nobody stopped, up to the order of sums; a larger step is another run."""
    recipe, source, whole = stopped
    run = Path(shutil.copytree(source, tmp_path / "run"))
    report = luthier.tune(recipe | SPLIT, folder=run)
    assert any("the rows of a step are the same" in note for note in report.notes)
    assert report.losses == pytest.approx(whole.losses, rel=1e-5)
    a, b = weights(run), weights(whole.folder)
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    with pytest.raises(RecipeError, match="another run"):
        luthier.tune(recipe | {"gradient_accumulation_steps": 2}, folder=run)


@pytest.mark.parametrize(
    "why, change",
    [
        ("dropout", {"tuner": {"name": "lora", "lora_dropout": 0.1}}),
        ("kto", {"objective": "kto", "data": UNPAIRED}),
    ],
)
def test_other_micro_batches_are_refused_where_they_count(base, tmp_path, why, change):
    recipe = base | {"tuner": "lora"} | change
    interrupted(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match=why) as error:
        luthier.tune(recipe | SPLIT, folder=tmp_path / "run")
    assert error.value.code == "another_run"


def test_the_process_of_a_caller_is_as_it_was(base, tmp_path):
    """Also where a run ends in another thread meanwhile."""
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)
    torch.set_default_dtype(torch.float64)
    try:
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        recipe = base | {"tuner": "lora", "max_steps": 2}
        beside = threading.Thread(target=luthier.tune, args=[recipe], kwargs={"folder": tmp_path / "beside"})
        beside.start()
        luthier.tune(recipe, folder=tmp_path / "run")
        beside.join()
        assert (tmp_path / "beside" / "report.json").is_file()
        luthier.load(tmp_path / "run")
        after = torch.get_rng_state(), np.random.get_state(), random.getstate()
        assert torch.equal(before[0], after[0]) and before[2] == after[2]
        assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
