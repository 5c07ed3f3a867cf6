"""Runs every arm with every seed in one folder, resumably, and hands the reports to judge.py.

FOLDER/study.json says which comparison lies here, ARM-SEED/ are the runs, budget.json and learning_rates.json
what the pilots measured, comparison.json and report.html the result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from luthier.errors import DiskError, NotFinite, RecipeError, from_code
from luthier.recipe.recipe import Recipe, plain
from luthier.registry import COSTS
from luthier.registry import metric as metric_of
from luthier.report.numbers import format_metric
from luthier.storage import files
from luthier.storage.layout import PAUSED
from luthier.study.compare.judge import ArmResult, NoMetric, arms_behind, judge, no_metric, read_report
from luthier.study.compare.spec import (
    TUNING_SEED,
    ComparisonSpec,
    join_names,
    parse_budget,
    resolve_arms,
)

STUDY = "study.json"
RUNGS = (0.25, 0.5)  # shares of the steps at which arms that cannot win are stopped
BATCHED_RUNS = 8  # side by side at most
PILOT_STEPS = 6  # by which a budget of time or tokens is turned into steps


def run_comparison(spec: ComparisonSpec, folder: Path | None = None, callback: Any = None) -> dict[str, Any]:
    """Run every arm with every seed and judge them; the result as plain data, also written to
    FOLDER/comparison.json and report.html.
    """
    from luthier.report.comparison import page
    from luthier.report.console import Callback
    from luthier.report.status import StatusFile

    folder = Path(folder or Path("runs") / f"compare-{spec.fingerprint()}")
    spec, added = with_earlier_arms(spec, folder)
    arms, notes, unable = resolve_arms(spec)
    notes += added
    runner = Runner(spec, folder, StatusFile(callback or Callback(), folder))
    with _exclusive(folder, spec):
        for name, error in unable.items():
            runner.fail(name, error)
        arms = runner.apply_budget(arms)
        arms, picked = runner.pick_learning_rates(arms)
        notes += picked
        for note in notes:
            runner.callback.warn(note)
        results = {}
        for name, recipe in spec.arms.items():
            failed = str(runner.failed.get(name, ""))
            results[name] = ArmResult(arms.get(name, recipe), stopped=failed)
        if spec.stop_early and len(arms) > 2 and not any(recipe.plan for recipe in arms.values()):
            for share in RUNGS:
                runner.run_all(results, share)
                runner.stop_arms(results, share)
        runner.run_all(results)
        if runner.failed and all(arm.stopped for arm in results.values()):
            raise next(iter(runner.failed.values()))
        result = {**judge(spec, results), "notes": notes, "date": str(date.today()), "folder": str(folder)}
        files.write_json(folder / "comparison.json", result)
        files.write_text(folder / "report.html", page(result))
    return result


def with_earlier_arms(spec: ComparisonSpec, folder: Path) -> tuple[ComparisonSpec, list[str]]:
    """A comparison together with the arms that its folder holds already, and a note of them. Raises
    RecipeError where the folder holds another comparison: one with other settings, or with another recipe
    under the name of one of these arms.
    """
    path = folder / STUDY
    if not path.is_file():
        return spec, []
    study = files.read_object(path, fingerprint=str)
    if study["fingerprint"] == spec.fingerprint():
        return spec, []
    earlier: dict[str, Recipe] = {}
    if study.get("settings") == spec.settings():
        earlier = {name: Recipe.load(keys) for name, keys in study["arms"].items()}
    alike = all(
        earlier[name].fingerprint() == recipe.fingerprint()
        for name, recipe in spec.arms.items()
        if name in earlier
    )
    if not earlier or not alike:
        raise RecipeError(f"{folder} holds another comparison; choose another folder with --output-dir")
    added = [name for name in spec.arms if name not in earlier]
    notes = []
    if added:
        notes.append(f"{join_names(added)}: added to {join_names(list(earlier))}, which were here before")
    return replace(spec, arms={**earlier, **spec.arms}), notes


@contextmanager
def _exclusive(folder: Path, spec: ComparisonSpec) -> Iterator[None]:
    """The folder for one process; another process in it is refused."""
    with files.exclusive(folder):
        arms = {name: plain(recipe.public()) for name, recipe in spec.arms.items()}
        study = {
            "fingerprint": spec.fingerprint(),
            "arms": arms,
            "seeds": spec.seeds,
            "settings": spec.settings(),
        }
        files.write_json(folder / STUDY, study)
        yield


@dataclass
class Runner:
    """Executes the runs of a comparison in its folder."""

    spec: ComparisonSpec
    folder: Path
    callback: Any
    failed: dict[str, RecipeError] = field(default_factory=dict)  # arms that cannot run, and why

    def fail(self, name: str, error: RecipeError) -> None:
        """An arm cannot run, or its run ended without a result: the others go on."""
        self.failed[name] = error
        self.callback.warn(f"{name} is left out: {error}")

    # ----------------------------------------------------------------------------- before the runs

    def apply_budget(self, arms: dict[str, Recipe]) -> dict[str, Recipe]:
        """Every arm with its number of steps. Time and tokens are turned into steps by a timed pilot run of
        each arm, once: budget.json keeps the number.
        """
        if self.spec.budget is None:
            return arms
        unit, size = parse_budget(self.spec.budget)
        path = self.folder / "budget.json"
        steps = files.read_json(path) if path.is_file() else {}
        budgeted = {}
        for name, recipe in arms.items():
            if unit == "steps":
                steps[name] = max(1, int(size))
            elif name not in steps:
                try:
                    steps[name] = max(1, int(size / self._pilot(name, recipe, unit)))
                except DiskError:
                    raise
                except RecipeError as error:
                    self.fail(name, error)
                    continue
                files.write_json(path, steps)
            budgeted[name] = recipe.but(max_steps=steps[name])
        return budgeted

    def _pilot(self, name: str, recipe: Recipe, unit: str) -> float:
        """Seconds (median) or tokens (mean) of a step, by a short run."""
        run = self.folder / "pilot" / name
        self.callback.stage(f"{name}: {PILOT_STEPS} steps to measure how many fit into {self.spec.budget}")
        self.perform(recipe.but(max_steps=PILOT_STEPS, evaluate=[], lr_scheduler_type="constant"), run)
        logs = files.read_rows(run / "metrics.jsonl")[1:]  # the first step also warms up
        average = {"seconds": np.median, "tokens": np.mean}[unit]
        return float(average([log[unit] for log in logs]))

    def pick_learning_rates(self, arms: dict[str, Recipe]) -> tuple[dict[str, Recipe], list[str]]:
        """Every arm at its best learning rate, and notes for the reader. learning_rates.json keeps what was
        measured.
        """
        if not self.spec.learning_rates:
            return arms, []
        rates = sorted(set(self.spec.learning_rates))
        measured = self._measure_learning_rates(arms, rates)
        notes = [
            f"each arm uses the best of {len(rates)} learning rates, chosen on the same"
            " held-out rows with a separate seed"
        ]
        better = max if metric_of(self.spec.metric).higher_is_better else min
        edges = {rates[0]: "smallest", rates[-1]: "largest"}
        picked = {}
        for name, recipe in arms.items():
            if name in self.failed:
                continue
            finite = {}
            for rate in rates:
                value = measured[name][f"{rate:g}"]
                if value is not None:
                    finite[rate] = value
            if not finite:
                rates_text = ", ".join(measured[name])
                error = RecipeError(
                    f"arm {name} diverged at every learning rate ({rates_text}); add smaller ones"
                )
                self.fail(name, error)
                continue
            best = better(finite, key=finite.__getitem__)
            note = f"{name}: learning rate {best:g}"
            if best in edges:
                note += f", the {edges[best]} of them: a better one may lie outside the range"
            notes.append(note)
            picked[name] = recipe.but(learning_rate=best)
        return picked, notes

    def _measure_learning_rates(
        self, arms: dict[str, Recipe], rates: list[float]
    ) -> dict[str, dict[str, float | None]]:
        """arm -> learning rate, as text -> the metric that its run ended with; None where it diverged."""
        path = self.folder / "learning_rates.json"
        measured: dict[str, dict[str, float | None]] = files.read_json(path) if path.is_file() else {}
        runs: dict[Path, Recipe] = {}
        labels: dict[Path, tuple[str, str]] = {}
        for name, recipe in arms.items():
            for rate in rates:
                label = f"{rate:g}"
                if label not in measured.get(name, {}):
                    run = self.folder / "rates" / f"{name}-{label}"
                    runs[run] = recipe.but(learning_rate=rate, seed=TUNING_SEED)
                    labels[run] = name, label
        self._run_batched(runs, None)
        with self.callback.training(len(runs), 0):
            for i, (run, recipe) in enumerate(runs.items()):
                name, label = labels[run]
                began = time.perf_counter()
                if name in self.failed:
                    continue
                try:
                    value = self._final_metric(recipe, run)
                except (NoMetric, DiskError):
                    raise
                except RecipeError as error:
                    self.fail(name, error)
                    continue
                measured.setdefault(name, {})[label] = value
                files.write_json(path, measured)
                outcome = "diverged" if value is None else self._format(value)
                self._report(i + 1, began, f"{name}, learning rate {label}: {outcome}")
        return measured

    def _final_metric(self, recipe: Recipe, run: Path) -> float | None:
        """The metric that a run ends with; None where it diverged."""
        try:
            if not (run / "report.json").is_file():
                self.perform(recipe, run)
        except NotFinite:
            return None
        after = read_report(run)["after"]
        if self.spec.metric not in after:
            raise no_metric(self.spec.metric, after)
        return float(after[self.spec.metric])

    # ------------------------------------------------------------------------------------ the runs

    def run_all(self, results: dict[str, ArmResult], until: float | None = None) -> None:
        """Every arm that is not stopped, with every seed, to its end or up to a share of its steps."""
        recipes: dict[Path, Recipe] = {}
        labels: dict[Path, tuple[str, int]] = {}
        for seed in self.spec.seed_values or range(self.spec.seeds):
            for name, arm in results.items():
                if not arm.stopped:
                    run = self.folder / f"{name}-{seed}"
                    recipes[run] = arm.recipe.but(seed=seed)
                    labels[run] = name, seed
        done = self._run_batched(recipes, until)
        progress = ""
        if until is not None:
            progress = f", {100 * until:.0f}% of the steps"
        with self.callback.training(len(labels), 0):
            for i, (run, (name, seed)) in enumerate(labels.items()):
                arm, began = results[name], time.perf_counter()
                if name in self.failed:
                    continue
                arm.runs[seed] = run
                if run not in done and not (run / "report.json").is_file():
                    self._run_one(name, arm, seed, run, until)
                if name in self.failed:
                    continue
                outcome = "diverged" if arm.stopped else self._last_metric(run)
                self._report(i + 1, began, f"{name}, seed {seed}{progress}: {outcome}")

    def _run_one(self, name: str, arm: ArmResult, seed: int, run: Path, until: float | None) -> None:
        """One run of an arm; an arm that diverges is stopped, and so is one whose run fails."""
        try:
            self.perform(arm.recipe.but(seed=seed), run, until)
        except NotFinite as error:
            arm.stopped = f"it diverged with seed {seed}: {error}"
            self.callback.warn(f"{name} was stopped: {arm.stopped}")
        except DiskError:  # the same for every arm
            raise
        except RecipeError as error:
            del arm.runs[seed]
            arm.stopped = f"its run with seed {seed} failed: {error}"
            self.fail(name, from_code(error.code, f"arm {name}, seed {seed}: {error}"))

    def stop_arms(self, results: dict[str, ArmResult], share: float) -> None:
        """Stop the arms that cannot win any more, once all have made a sensible number of steps."""
        for arm in results.values():
            for run in arm.folders():
                if (run / PAUSED).is_file() and files.read_json(run / PAUSED)["step"] < self.spec.least_steps:
                    return
        for name, why in arms_behind(self.spec, results, share).items():
            results[name].stopped = why
            self.callback.warn(f"{name} was stopped: {why}")

    def perform(self, recipe: Recipe, run: Path, until: float | None = None) -> None:
        """One run, in a process of its own unless the spec says otherwise. Raises what it ends with."""
        if self.spec.subprocesses:
            from luthier.run import subprocess

            keys = {key: value for key, value in recipe.public().items() if key != "output_dir"}
            subprocess.tune(keys, run, until)
        else:
            from luthier.run.run import perform

            perform(recipe, run, stop_at=until)

    def _run_batched(self, runs: Mapping[Path, Recipe], until: float | None) -> set[Path]:
        """Runs that share a base model, side by side in one process: the folders of those that ended so.

        Where one of a batch fails, all of it are run alone afterwards, so that it is known which.
        """
        if not self.spec.together or self.spec.metric in COSTS:
            return set()
        from luthier.run import batched

        alike: dict[str, list[Path]] = {}
        for run, recipe in runs.items():
            key = batched.shared_key(recipe)
            if key and not (run / "report.json").is_file():
                alike.setdefault(key, []).append(run)
        done: set[Path] = set()
        for group in alike.values():
            for start in range(0, len(group), BATCHED_RUNS):
                batch = group[start : start + BATCHED_RUNS]
                if len(batch) > 1 and self._run_batch({run: runs[run] for run in batch}, until):
                    done.update(batch)
        return done

    def _run_batch(self, batch: Mapping[Path, Recipe], until: float | None) -> bool:
        """Several runs in one process; whether all of them ended."""
        from luthier.run import batched, subprocess

        names = join_names([run.name for run in batch])
        self.callback.stage(
            f"{names}: trained in one process on a shared base model; peak memory is that of all of"
            " them together"
        )
        runs = [(recipe, run) for run, recipe in batch.items()]
        try:
            if self.spec.subprocesses:
                subprocess.side_by_side(runs, stop_at=until)
            else:
                batched.perform(runs, stop_at=until)
        except DiskError:
            raise
        except RecipeError as error:
            self.callback.warn(f"{error}; the runs are trained one after the other instead")
            return False
        return True

    # ------------------------------------------------------------------------------------ progress

    def _report(self, step: int, began: float, line: str) -> None:
        """A line of progress for a run."""
        self.callback.step({"step": step, "seconds": time.perf_counter() - began, "message": line})

    def _format(self, value: Any) -> str:
        return f"{metric_of(self.spec.metric).label} {format_metric(self.spec.metric, value)}"

    def _last_metric(self, run: Path) -> str:
        """What a run measured last, finished or paused."""
        if (run / "report.json").is_file():
            report = files.read_json(run / "report.json")
            measured = {**report["stats"], **report["after"]}
        else:
            report = files.read_json(run / "paused.json")
            measured = {**report["stats"], **report["metrics"]}
        value = measured.get(self.spec.metric)
        if isinstance(value, (int, float)):
            return self._format(value)
        return "done"
