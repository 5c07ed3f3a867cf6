"""Runs a claim: the sweep that picks a value for each arm, then every arm with every test seed, resumably."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from luthier.errors import NotFinite, RecipeError, from_code
from luthier.recipe.catalogue import claims_folder
from luthier.run import subprocess
from luthier.storage import files
from luthier.storage.layout import read_log
from luthier.study.reproduce.judge import (
    LEVEL,
    TWO_LOOKS,
    RunNumbers,
    combine,
    judge,
    rounded,
    seeds_needed,
)
from luthier.study.reproduce.spec import (
    MAX_SEEDS,
    SKIPPED,
    TUNING_SEED,
    UNDECIDED,
    UNTESTABLE,
    Claim,
    read_claim,
    sweep_label,
)

EXTENSIONS = 4  # values that a sweep is extended by where its best is at the edge
MANY_SEEDS = 1000  # beyond which it is not counted how many are needed


def reproduce(
    name: str,
    seeds: int | None = None,
    folder: Path | None = None,
    runs: Path = Path("runs/claims"),
    tell: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Run a claim and write its result to FOLDER/results/NAME.json.

    seeds: how many; by default those of the claim's pilot, and where these do not decide it as many as their
    spread asks for, 20 at most. Runs that an earlier call finished are not done again. tell: is called with a
    line a run. A claim on a model that is not here is skipped, and nothing is written.
    """
    claim = read_claim(name, folder)
    folder = folder or claims_folder()
    if seeds is not None and not 2 <= seeds <= MAX_SEEDS:
        raise RecipeError(f"--seeds: an interval needs 2 to {MAX_SEEDS} seeds, not {seeds}")
    if claim.absent:
        tell(f"{name}: {SKIPPED}: {claim.absent}")
        return {"claim": claim.claim, "paper": claim.paper, "verdict": SKIPPED, "reason": claim.absent}
    result = {"claim": claim.claim, "paper": claim.paper, "fingerprint": claim.fingerprint()}
    if claim.untestable:
        tell(f"{name}: {UNTESTABLE}: {claim.untestable}")
        result |= {"verdict": UNTESTABLE, "reason": claim.untestable, "date": str(date.today())}
    else:
        result |= _run(claim, seeds, runs, tell)
        tell(f"{name}: {result['verdict']}")
    return _write(folder, name, result)


def _run(claim: Claim, seeds: int | None, folder: Path, tell: Callable[[str], Any]) -> dict[str, Any]:
    """The verdict on a claim, with everything it rests on."""
    first = seeds or claim.seeds
    level = LEVEL if seeds else TWO_LOOKS
    sweep, tests = claim.runs(first)
    runner = Runner(claim, folder, Progress(claim.name, len(sweep) + len(tests), tell))
    swept = runner.sweep(sweep)
    values = _select(claim, swept)
    numbers = runner.test(tests, values)
    judged = judge(claim, numbers, level)
    power: dict[str, Any] = {"pilot": first}
    if seeds is None and _verdict(judged) == UNDECIDED:
        power["needed"] = seeds_needed(judged, claim, MANY_SEEDS)
        more = min(MAX_SEEDS, power["needed"])
        if more > first:
            later = [(arm, seed) for arm, seed in claim.runs(more)[1] if seed >= first]
            runner.progress.total += len(later)
            numbers |= runner.test(later, values)
            judged = judge(claim, numbers, level)
    metrics = {expectation.metric for expectation in claim.expectations}
    summaries: dict[str, dict[str, Any]] = {arm: {} for arm in claim.arms}
    for (arm, seed), run in numbers.items():
        summaries[arm][str(seed)] = run.summary(metrics)
    return {
        "verdict": _verdict(judged),
        "expectations": judged,
        "seeds": sorted({seed for _, seed in numbers}),
        "power": power,
        "tuning_seed": TUNING_SEED if sweep else None,
        "learning_rates": {arm: value for arm, value in values.items() if value is not None},
        "sweeps": swept,
        "select": claim.select,
        "at_edge": [arm for arm in swept if at_edge(swept[arm], values[arm])],
        "numbers": summaries,
        "machine": {**machine(), **_devices(numbers.values())},
        "date": str(date.today()),
        "seconds": round(runner.seconds),
    }


def _verdict(judged: Iterable[Mapping[str, Any]]) -> str:
    return combine([expectation["verdict"] for expectation in judged])


def at_edge(measured: Mapping[str, float | None], value: float | None) -> bool:
    """Whether a value is the smallest or the largest of its sweep, diverged ones counted."""
    values = [float(label) for label in measured]
    return value in (min(values), max(values))


def _beyond(measured: Mapping[str, float | None], value: float) -> float:
    """The next value on the far side of the one at the edge, a step as large as the sweep's own there."""
    values = sorted(float(label) for label in measured)
    if value == values[0]:
        return float(f"{value * value / values[1]:.2g}")
    return float(f"{value * value / values[-2]:.2g}")


def _select(claim: Claim, swept: dict[str, dict[str, float | None]]) -> dict[str, float | None]:
    """The value of what is swept for each arm: its best, its only one, or None."""
    selected = {arm: next(iter(claim.sweep_values(arm)), None) for arm in claim.arms}
    for arm, measured in swept.items():
        selected[arm] = _best(claim, arm, measured)
    return selected


def _best(claim: Claim, arm: str, measured: Mapping[str, float | None]) -> float:
    """The best of an arm's sweep. Raises RecipeError where it diverged everywhere."""
    better = {"lowest": min, "highest": max}[claim.selection[0]]
    finite = {}
    for value, metric in measured.items():
        if metric is not None and metric == metric:
            finite[value] = metric
    if not finite:
        raise claim.error(
            f"arm {arm}: diverged at every {sweep_label(claim.sweep)} of its sweep; add smaller ones"
        )
    return float(better(finite, key=finite.__getitem__))


@dataclass
class Progress:
    """A line a run, with the time that is left at the pace so far."""

    name: str
    total: int
    tell: Callable[[str], Any]
    done: int = 0
    durations: list[float] = field(default_factory=list)  # of runs that an earlier call had not finished

    def step(self, label: str, seconds: float, finished_before: bool) -> None:
        self.done += 1
        outcome = "was finished"
        if not finished_before:
            self.durations.append(seconds)
            outcome = f"{seconds:.0f} s"
        if self.durations and self.done < self.total:
            left = (self.total - self.done) * statistics.fmean(self.durations)
            outcome += f"; about {left:.0f} s left"
        self.tell(f"[{self.done}/{self.total}] {self.name}: {label}: {outcome}")


@dataclass
class Runner:
    """Executes the runs of a claim, each in a folder of its own below `folder`; claims with an arm in common
    share its runs.
    """

    claim: Claim
    folder: Path
    progress: Progress
    seconds: float = 0.0  # of all runs, whenever they were done

    def test(
        self, runs: list[tuple[str, int]], values: Mapping[str, float | None]
    ) -> dict[tuple[str, int], RunNumbers]:
        """What is reported: the numbers of each (arm, seed), each arm with its selected value."""
        return {(arm, seed): self.perform(arm, seed, values[arm]) for arm, seed in runs}

    def sweep(self, runs: list[tuple[str, int, float]]) -> dict[str, dict[str, float | None]]:
        """arm -> swept value, as text -> the metric that selects; None where the run diverged. A sweep of
        learning rates whose best is at its edge goes on beyond it, by EXTENSIONS values at most.
        """
        measured: dict[str, dict[str, float | None]] = {}
        for arm, seed, value in runs:
            measured.setdefault(arm, {})[f"{value:g}"] = self.try_value(arm, seed, value)
        if self.claim.sweep != "learning_rate":
            return measured
        for arm, values in measured.items():
            for _ in range(EXTENSIONS):
                best = _best(self.claim, arm, values)
                if not at_edge(values, best):
                    break
                beyond = _beyond(values, best)
                self.progress.total += 1
                values[f"{beyond:g}"] = self.try_value(arm, TUNING_SEED, beyond)
            measured[arm] = dict(sorted(values.items(), key=lambda item: float(item[0])))
        return measured

    def try_value(self, arm: str, seed: int, value: float) -> float | None:
        """The metric that selects, with one value of what is swept; None where the run diverged."""
        try:
            run = self.perform(arm, seed, value)
        except NotFinite:
            return None
        return rounded(run.value(self.claim, arm, self.claim.selection[1]))

    def perform(self, arm: str, seed: int, value: float | None) -> RunNumbers:
        """One run. Raises NotFinite where it diverged, RecipeError where it failed otherwise."""
        keys = self.claim.recipe(arm, seed, value)
        text = json.dumps([keys, self.claim.fresh], sort_keys=True, default=str)
        # by what is run, not by who asks for it: claims share the arms that they have in common
        folder = self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        label = f"{arm}, seed {seed}"
        if value is not None:
            label += f", {sweep_label(self.claim.sweep)} {value:g}"
        began = time.perf_counter()
        finished = (folder / "report.json").is_file()
        if not finished:
            self._train(keys, folder, arm, seed, label)
        self.progress.step(label, time.perf_counter() - began, finished)
        numbers = read_numbers(folder)
        self.seconds += numbers.duration
        return numbers

    def _train(self, keys: dict[str, Any], folder: Path, arm: str, seed: int, label: str) -> None:
        began = time.perf_counter()
        try:
            if self.claim.fresh:
                subprocess.tune(keys, folder)
            else:
                _in_process(keys, folder)
        except RecipeError as error:
            if isinstance(error, NotFinite):
                self.progress.step(f"{label}, diverged", time.perf_counter() - began, False)
            message = f"claim {self.claim.name}: arm {arm}, seed {seed}: {error}"
            raise from_code(error.code, message) from None
        _remove_weights(folder)
        (folder / "took.json").write_text(json.dumps(time.perf_counter() - began), encoding="utf-8")


def _in_process(keys: dict[str, Any], folder: Path) -> None:
    from luthier.recipe.recipe import Recipe
    from luthier.run.run import perform

    perform(Recipe.load(keys), folder)


def read_numbers(folder: Path) -> RunNumbers:
    """What a finished run measured."""
    report = files.read_object(folder / "report.json", folder=str, before=dict, after=dict, stats=dict)
    duration = 0.0
    if (folder / "took.json").is_file():
        duration = files.read_json(folder / "took.json")
    where = Path(report["folder"])
    log = read_log(where)
    return RunNumbers(report["before"], report["after"], report["stats"], duration, log, where)


def _remove_weights(folder: Path) -> None:
    """Of a finished run the numbers stay and how it was made; its weights are not needed again."""
    for path in [*folder.rglob("checkpoint-*")]:
        shutil.rmtree(path)
    for path in folder.rglob("*.safetensors"):
        path.unlink()


def _devices(runs: Iterable[RunNumbers]) -> dict[str, str]:
    """On what, and in which precision, the runs computed."""
    stats = [run.stats for run in runs]
    devices = {}
    for key in ("device", "dtype"):
        devices[key] = ", ".join(sorted({str(of_run[key]) for of_run in stats if key in of_run}))
    return devices


def machine() -> dict[str, Any]:
    """Where numbers were measured; elsewhere they are others."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.M)
        if match:
            cpu = match[1]
    versions = {"python": platform.python_version()}
    for package in ("luthier", "torch", "transformers", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": cpu,
        "cores": cores,
        "threads": os.environ.get("OMP_NUM_THREADS", "as torch chooses"),
        "system": platform.system(),
        "versions": versions,
    }


def _write(folder: Path, name: str, result: dict[str, Any]) -> dict[str, Any]:
    path = folder / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
    return result
