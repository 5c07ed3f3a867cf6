"""A run that is killed, at a random moment or at any operation on a file, and goes on: its end is that of
a run that nobody killed, bit for bit, and nothing half written is left.

The operations are counted in the process itself: functions of `os`, files opened for writing, each write to
them, and the files of safetensors. At the n-th of them the process ends as `kill -9` would end it, before the
operation or in the middle of it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import yaml

from helpers.hostile import COUNT, SEED, Tally
from helpers.rows import PAIRS, recipe_of

pytestmark = pytest.mark.slow
ENDED = 77  # exit status of a process that ended itself at an operation
RUN = "luthier.tune(json.load(open(sys.argv[1])), folder=sys.argv[2])"
COMPARE = """
from pathlib import Path
from luthier.recipe.recipe import Recipe
from luthier.study.compare import ComparisonSpec, run_comparison
arms = {name: Recipe.load(keys) for name, keys in json.load(open(sys.argv[1])).items()}
run_comparison(ComparisonSpec(arms, 1, subprocesses=False), Path(sys.argv[2]))
"""
COUNTING = """
import builtins, io, json, os, sys
import luthier, luthier.run.run
import safetensors.torch
place = os.path.abspath(sys.argv[2])
last, half, count = int(sys.argv[3]), sys.argv[4] == "half", 0

def operation(finish=None):
    global count
    count += 1
    if count == last:
        if half and finish is not None:
            finish()
        os._exit(77)

def counted(function):
    def call(*given, **named):
        operation()
        return function(*given, **named)
    return call

for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync", "truncate"):
    setattr(os, name, counted(getattr(os, name)))

class File:
    def __init__(self, file): self.__dict__["file"] = file
    def write(self, content):
        def part():
            self.file.write(content[: len(content) // 2])
            self.file.flush()
        operation(part)
        return self.file.write(content)
    def __enter__(self):
        self.file.__enter__()
        return self
    def __exit__(self, *why): return self.file.__exit__(*why)
    def __iter__(self): return iter(self.file)
    def __getattr__(self, name): return getattr(self.file, name)

plain_open = io.open
def opened(path, mode="r", *given, **named):
    writes = set(mode) & set("wax+") and not isinstance(path, int)
    if not (writes and os.path.abspath(os.fspath(path)).startswith(place)):
        return plain_open(path, mode, *given, **named)
    operation()
    return File(plain_open(path, mode, *given, **named))
builtins.open = io.open = opened

save = safetensors.torch.save_file
def save_file(tensors, path, *given, **named):
    def part():
        save(tensors, path, *given, **named)
        with plain_open(path, "rb+") as file:
            file.truncate(os.path.getsize(path) // 2)
    operation(part)
    return save(tensors, path, *given, **named)
safetensors.torch.save_file = save_file
"""
TOLD = "\nif last < 0: plain_open(sys.argv[5], 'w').write(str(count))\n"
TIMES = ("seconds", "tokens_per_second", "peak_memory_mb")
# what holds times of its own or the folder's name all over, so that not even its checksum is alike
OWN = (
    *("metrics.jsonl", "report.json", "report.html", "README.md", "run.json", "state.json", "recipe.yaml"),
    *(".lock", "status.json"),
)
PAGES = ("report.html", "README.md", ".lock", "status.json")  # of these only that they are there is compared
# and what JSON says of these: checksums, among others its own; the front of a comparison is one of seconds,
# the fingerprint of a run of a plan that of a recipe that names the folder
VOLATILE = {*TIMES, *OWN, "checksum", "manifest", "fingerprint", "front"}
VOLATILE |= {"folder", "data", "output_dir", "date", "runs", "notes"}


def without_times(value, folder: str):
    """A value without what a clock says, or where it lies. folder: its path, which is left out of texts."""
    if isinstance(value, dict):
        return {k: without_times(v, folder) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, list):
        return [without_times(inner, folder) for inner in value]
    if isinstance(value, str):
        return value.replace(folder, "").replace(f"{Path(folder).name}/", "")
    return value


def content(path: Path, folder: Path):
    """What must be alike in two folders of runs."""
    text = path.read_bytes()
    if path.name in PAGES:
        return None
    if path.suffix == ".json":
        return without_times(json.loads(text), str(folder))
    if path.suffix == ".jsonl" and path.name in OWN:
        return [without_times(json.loads(line), str(folder)) for line in text.splitlines()]
    if path.name == "recipe.yaml":
        return without_times(yaml.safe_load(text), str(folder))
    return text


def differences(whole: Path, other: Path) -> list[str]:
    """In which files two folders of runs differ, and of JSON in which keys."""
    names = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    there = {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    different = [f"{name} is only in one of them" for name in sorted(names ^ there)]
    for name in sorted(names & there):
        a, b = content(whole / name, whole), content(other / name, other)
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                if a.get(key) != b.get(key):
                    different.append(f"{name} differs in {key}")
        elif a != b:
            different.append(f"{name} differs")
    return different


class Harness:
    """Runs of one recipe that are killed and go on."""

    def __init__(self, forks, folder: Path, recipe, code: str = RUN):
        self.forks, self.folder, self.code = forks, folder, code
        folder.mkdir()
        (folder / "recipe.json").write_text(json.dumps(recipe))
        process = self.start("whole", -1, "before", "count")
        assert process.wait() == 0, process.said()
        self.operations = int((folder / "count").read_text())
        began = time.monotonic()
        process = forks(self.plain(), folder, "recipe.json", "again")
        assert process.wait() == 0, process.said()
        self.seconds = time.monotonic() - began
        assert not differences(folder / "whole", folder / "again")

    def plain(self) -> str:
        return f"import json, sys\nimport luthier, luthier.run.run\n{self.code}"

    def start(self, name: str, at: int, how: str, *rest: str):
        """A process that ends itself at an operation."""
        code = COUNTING + self.code + TOLD
        return self.forks(code, self.folder, "recipe.json", name, str(at), how, *rest)

    def kill_at(self, name: str, at: int, how: str) -> None:
        process = self.start(name, at, how)
        assert process.wait() in (ENDED, 0), process.said()

    def kill_sometime(self, name: str, chance: random.Random) -> None:
        process = self.forks(self.plain(), self.folder, "recipe.json", name)
        time.sleep(chance.random() * self.seconds)
        process.kill()
        process.wait()

    def finish(self, tally: Tally, name: str, label: str) -> None:
        """Start the run again, and compare its end."""
        process = self.forks(self.plain(), self.folder, "recipe.json", name)
        if process.wait() != 0:
            tally.add("tracebacks", f"{label}: {process.said()[-600:]}")
        elif different := differences(self.folder / "whole", self.folder / name):
            tally.add("silently different", f"{label}: {different}")
        else:
            tally.add("the same")
        shutil.rmtree(self.folder / name)


RECIPES = {
    "sft": {
        "tuner": {"name": "lora", "r": 2, "lora_dropout": 0.1},
        "stages": [{"name": "ifd", "share": 0.9}],
    },
    "dpo": {"tuner": {"name": "lora", "r": 2}, "objective": "dpo", "data": PAIRS[:12]},
    "two": {
        "tuner": {"name": "lora", "r": 2},
        "plan": [{"seed": 3}, {"learning_rate": 1e-4, "evaluate": ["loss", "accuracy"]}],
    },
}


def recipe(model: str, name: str) -> dict:
    short = {"max_steps": 3, "save_steps": 1, "logging_steps": 1, "eval_data": 0.2, "evaluate": ["loss"]}
    keys = recipe_of(model) | {"tuner": "lora"} | short
    keys["data"] = keys["data"][:16]
    return keys | RECIPES[name]


def killed(i: int) -> str:
    """The folder of a run that is killed: a name that no other path ends in."""
    return f"killed-{i}-run"


@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_operations(shallow, forks, tmp_path, name):
    chance = random.Random(f"{SEED} {name}")
    harness = Harness(forks, tmp_path / "runs", recipe(shallow, name))
    kills = max(2, COUNT // 20 // len(RECIPES))
    tally = Tally(f"kills at file operations, {name} (of {harness.operations} operations)")
    places = list(range(1, harness.operations + 1))
    chance.shuffle(places)
    for i in range(kills):
        at, how = places[i % len(places)], chance.choice(("before", "half"))
        harness.kill_at(killed(i), at, how)
        label = f"{i} {how} operation {at}"
        if chance.random() < 0.25:  # and again while it goes on
            again = chance.randint(1, harness.operations)
            harness.kill_at(killed(i), again, how)
            label += f", then {again}"
        harness.finish(tally, killed(i), label)
    tally.close()


@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_random_moments(shallow, forks, tmp_path, name):
    chance = random.Random(f"{SEED} {name}")
    harness = Harness(forks, tmp_path / "runs", recipe(shallow, name))
    tally = Tally(f"kills at random moments, {name}")
    for i in range(max(2, COUNT // 20 // len(RECIPES))):
        for _ in range(chance.choice((1, 1, 2))):
            harness.kill_sometime(killed(i), chance)
        harness.finish(tally, killed(i), str(i))
    tally.close()


def test_killed_comparison(shallow, forks, tmp_path):
    chance = random.Random(SEED)
    arms = {}
    for name, rank in (("two", 2), ("four", 4)):
        arms[name] = recipe(shallow, "sft") | {"tuner": {"name": "lora", "r": rank}}
    harness = Harness(forks, tmp_path / "runs", arms, COMPARE)
    tally = Tally(f"kills of a comparison (of {harness.operations} operations)")
    for i in range(max(2, COUNT // 100)):
        harness.kill_at(killed(i), chance.randint(1, harness.operations), chance.choice(("before", "half")))
        harness.finish(tally, killed(i), str(i))
    tally.close()


def test_the_harness_notices(tmp_path):
    """A difference is a difference."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.safetensors").write_bytes(os.urandom(4))
        (tmp_path / name / "run.json").write_text(json.dumps({"seconds": name, "step": len(name)}))
    (tmp_path / "b" / "x.part").write_text("")
    assert len(differences(tmp_path / "a", tmp_path / "b")) == 2
    (tmp_path / "b" / "run.json").write_text(json.dumps({"seconds": 0, "step": 2}))
    assert "run.json differs in step" in differences(tmp_path / "a", tmp_path / "b")
