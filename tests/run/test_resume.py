"""resume: killed and resumed is uninterrupted; killed anywhere goes on; a checkpoint half written is no
checkpoint; another version going on is told.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch

import luthier
from helpers.rows import PAIRS, SUMS, UNPAIRED, recipe_of
from helpers.runs import KILLED, weights
from luthier.clock import Clock
from luthier.errors import DiskError, RecipeError
from luthier.storage import checkpoints, files
from luthier.train.trainer import Trainer, draw


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


RECIPES = {
    "sft": {"tuner": "lora"},
    "full": {"tuner": "full"},
    "dpo": {"tuner": "lora", "objective": "dpo", "data": PAIRS},
    "dpo-start": {"tuner": "full", "objective": "dpo", "data": PAIRS},
    "kto": {"tuner": "lora", "objective": "kto", "data": UNPAIRED},
    "grpo": {
        "tuner": "lora",
        "objective": "grpo",
        "num_iterations": 2,
        "learning_rate": 1e-2,
        "live": [
            {"name": "rollout", "n": 4, "max_new_tokens": 4, "old": True},
            {"name": "score", "reward": "exact_match"},
        ],
    },
    "mezo": {"tuner": "lora", "estimator": "mezo"},
    "sam": {"tuner": "full", "estimator": "sam"},
    "lisa": {"tuner": {"name": "lisa", "n_layers": 1, "interval": 2}},
    "prompt": {"tuner": "prompt"},
    "stages": {"tuner": "lora", "stages": [{"name": "ifd", "share": 0.9}]},
    "dropout": {"tuner": {"name": "lora", "lora_dropout": 0.3}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_killed_and_resumed_is_uninterrupted(base, tmp_path, forks, name):
    """kill -9 at a step drawn from the test's name, then the same command: every tensor and every loss bit
    for bit.
    """
    recipe = base | {"max_steps": 7} | RECIPES[name]
    whole = luthier.tune(recipe, folder=tmp_path / "whole")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    dead = forks(KILLED, tmp_path, "recipe.json", "broken", str(1 + sum(map(ord, name)) % 6))
    assert dead.wait() == -signal.SIGKILL, dead.said()
    assert not (tmp_path / "broken" / "report.json").exists()
    resumed = luthier.tune(recipe, folder=tmp_path / "broken")
    assert resumed.losses == whole.losses
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


MOMENTS = {  # the process dies at the first call of this, which the second process passes
    "measuring the start": "luthier.methods.evaluators.quality.generate.Generate.run",
    "a stage": "luthier.methods.stages.select.ifd.IFD.__call__",
    "writing a checkpoint": "luthier.storage.checkpoints.verify",
    "naming a checkpoint": "luthier.storage.checkpoints.paths",
    "taking the adapter away": "luthier.methods.tuners._peft.PeftTunedModel.save",
    "the report": "luthier.report.page.write_report",
}


DIES = """
import importlib, json, os, signal, sys
import luthier, luthier.run.run
*path, name = sys.argv[3].split(".")
while path:
    try:
        owner = importlib.import_module(".".join(path))
        break
    except ModuleNotFoundError:
        name = path.pop() + "." + name
*above, last = name.split(".")
for part in above: owner = getattr(owner, part)
real = getattr(owner, last)
def dying(*given, **named):
    begun = os.path.exists(os.path.join(sys.argv[2], "run.json"))
    if begun and last == "checkpoints":
        written = any(p.suffix == ".part" for p in given[0].iterdir())
        begun = written or given[0].joinpath("checkpoint-2").exists()
    if begun:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **named)
setattr(owner, last, dying)
luthier.tune(json.load(open(sys.argv[1])), folder=sys.argv[2])
"""


@pytest.fixture(scope="module")
def never_killed(tiny, tmp_path_factory):
    """A recipe, and its report where nobody killed it."""
    recipe = recipe_of(tiny) | {
        "tuner": "lora",
        "stages": ["ifd"],
        "evaluate": ["loss", "generate", "forgetting"],
    }
    return recipe, luthier.tune(recipe, folder=tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_anywhere_goes_on(never_killed, tmp_path, forks, moment):
    """Not only between steps: whatever a kill leaves half done is done again or left aside."""
    recipe, whole = never_killed
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    dead = forks(DIES, tmp_path, "recipe.json", "broken", MOMENTS[moment])
    assert dead.wait() == -signal.SIGKILL, dead.said()
    assert not (tmp_path / "broken" / "report.json").exists()
    resumed = luthier.tune(recipe, folder=tmp_path / "broken")
    assert (resumed.losses, resumed.before, resumed.after) == (whole.losses, whole.before, whole.after)
    a, b = weights(whole.folder), weights(tmp_path / "broken")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_half_written_is_no_checkpoint(base, tmp_path):
    luthier.tune(base, folder=tmp_path)
    whole = checkpoints.paths(tmp_path)
    for name in ("checkpoint-9.part", "checkpoint-9.old", "checkpoint-10"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9.part" / "state.json").write_text("{}")
    assert checkpoints.paths(tmp_path) == whole


def test_another_version_going_on_is_told(base, tmp_path, monkeypatch):
    real = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: real(self) if self.roles.clock.step < 4 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        luthier.tune(base, folder=tmp_path)
    monkeypatch.setattr(Trainer, "step", real)
    state = json.loads((tmp_path / "run.json").read_text())
    assert state["version"] == luthier.__version__
    files.write_json(tmp_path / "run.json", state | {"version": "0.0.9"})
    assert any("started by luthier 0.0.9" in n for n in luthier.tune(base, folder=tmp_path).notes)


def test_killed_from_outside_three_times_in_a_row(base, tmp_path, forks):
    """Whatever it was doing just then, checkpoints included: the end is that of a run that nobody killed."""
    recipe = base | {"tuner": "lora", "max_steps": 32, "save_steps": 1, "logging_steps": 1}
    whole = luthier.tune(recipe, folder=tmp_path / "whole")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    code = "import json, luthier; luthier.tune(json.load(open('recipe.json')), folder='broken')"
    lines, seen = tmp_path / "broken" / "metrics.jsonl", 0
    for least in (2, 6, 12):
        running = forks(code, tmp_path)
        while running.poll() is None and seen < least:
            seen = len(lines.read_bytes().splitlines()) if lines.is_file() else 0
            time.sleep(0.001)
        running.kill()
        assert running.wait() == -signal.SIGKILL, running.said()
    resumed = luthier.tune(recipe, folder=tmp_path / "broken")
    assert resumed.losses == whole.losses and any("resuming from checkpoint-" in n for n in resumed.notes)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not list((tmp_path / "broken").rglob("*.part"))


def test_a_finished_run_answers_at_once_and_another_recipe_is_refused(base, tmp_path):
    first = luthier.tune(base, folder=tmp_path)
    began = time.perf_counter()
    assert luthier.tune(base, folder=tmp_path).losses == first.losses
    assert time.perf_counter() - began < 2
    with pytest.raises(RecipeError, match="holds another run.*learning_rate"):
        luthier.tune(base | {"learning_rate": 5e-3}, folder=tmp_path)
    with pytest.raises(RecipeError, match="different rows"):
        luthier.tune(base | {"data": SUMS[:-1]}, folder=tmp_path)
    again = luthier.tune(base | {"learning_rate": 5e-3, "overwrite": True}, folder=tmp_path)
    assert again.losses != first.losses


def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_stays(base, tmp_path, monkeypatch):
    import errno

    real = files.write_json

    def full(path, value):
        if path.name == "state.json" and value["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, value)

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(DiskError, match="is full .*saved so far is intact"):
        luthier.tune(base, folder=tmp_path)
    assert [p.name for p in checkpoints.paths(tmp_path)] == ["checkpoint-2"]
    monkeypatch.setattr(files, "write_json", real)
    assert len(luthier.tune(base, folder=tmp_path).losses) == 6


LIMITED = """
import json, resource, sys
import luthier
from luthier.errors import DiskError
from luthier.train.trainer import Trainer
step = Trainer.step
def stepping(self):
    if self.roles.clock.step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    return step(self)
Trainer.step = stepping
try:
    luthier.tune(json.load(open(sys.argv[1])), folder=sys.argv[2])
except DiskError as error:
    open("sentence", "w").write(str(error))
"""


def test_a_limit_on_the_size_of_files_is_a_sentence_and_the_last_checkpoint_stays(base, tmp_path, forks):
    (tmp_path / "recipe.json").write_text(json.dumps(base))
    process = forks(LIMITED, tmp_path, "recipe.json", "run")
    assert process.wait() == 0, process.said()
    assert "ulimit -f" in (tmp_path / "sentence").read_text()
    assert [p.name for p in checkpoints.paths(tmp_path / "run")] == ["checkpoint-2"]
    assert len(luthier.tune(base, folder=tmp_path / "run").losses) == 6


def test_old_checkpoints_leave(base, tmp_path):
    luthier.tune(base | {"save_steps": 1, "save_total_limit": 3}, folder=tmp_path)
    assert [p.name for p in checkpoints.paths(tmp_path)] == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]


def test_a_folder_half_cleared_leaves_nothing_to_the_next_run(base, tmp_path, monkeypatch):
    other = base | {"learning_rate": 5e-3, "evaluate": ["loss", "forgetting"], "overwrite": True}
    luthier.tune(base | {"evaluate": ["loss", "forgetting"]}, folder=tmp_path / "a")
    real = Path.unlink

    def dying(self, missing_ok=False):
        if self.name == "forgetting.jsonl":
            raise KeyboardInterrupt
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", dying)
    with pytest.raises(KeyboardInterrupt):
        luthier.tune(other, folder=tmp_path / "a")
    monkeypatch.setattr(Path, "unlink", real)
    files.write_json(
        tmp_path / "a" / "forgetting.jsonl",
        {"id": "old", "prompt": "", "completions": [[70, 71]], "own": True},
    )
    there, fresh = luthier.tune(other, folder=tmp_path / "a"), luthier.tune(other, folder=tmp_path / "b")
    assert (there.losses, there.after) == (fresh.losses, fresh.after)


def test_rows_of_one_step_do_not_depend_on_history():
    assert Trainer.__dataclass_fields__["drawn_rows"].default is None
    at = Clock(seed=1, step=5)
    assert draw(50, at, 4) == draw(50, Clock(seed=1, step=5), 4) != draw(50, Clock(seed=2, step=5), 4)
