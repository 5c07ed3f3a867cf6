"""A search carried out in its folder: study.journal holds the trials, trials/NUMBER-SEED their runs, test-...
the runs on test seeds, search.json and report.html the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.searchers._base import Suggestion, load_optuna
from luthier.report.console import Callback
from luthier.report.numbers import format_metric, format_number
from luthier.report.search import describe_dimension, page
from luthier.report.search_result import RESULT
from luthier.report.status import StatusFile
from luthier.storage import files
from luthier.study.search.measure import describe, measure, remove_weights
from luthier.study.search.optimize import optimize
from luthier.study.search.spec import SearchSpec
from luthier.study.search.trials import Trial, TrialStore, full_runs
from luthier.study.search.verdict import choose, dimension_of, judge

SPEC = "search_spec.json"
FORMER_SPEC = "quest.json"  # its name in version 0.1


def run_search(
    spec: SearchSpec,
    folder: Path | None = None,
    storage: str | None = None,
    callback: Any = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Search, test what was chosen on test seeds, and judge it; the result as plain data, also written to
    FOLDER/search.json and report.html. Resumes a search that was interrupted.

    storage: URL of a database, as Optuna has it; None: a journal in the folder.
    workers: how many of a Ray cluster measure side by side (luthier/study/cluster.py).
    """
    folder = Path(folder or Path("runs") / f"search-{spec.fingerprint()}")
    callback = StatusFile(callback or Callback(), folder)
    with files.exclusive(folder):
        _claim(folder, spec)
        store = open_store(spec, folder, storage)
        for note in _opening_notes(spec):
            callback.warn(note)

        def progress(trial: Trial) -> None:
            callback.step(
                {
                    "step": int(full_runs(store.finished()) + 1e-9),
                    "seconds": trial.measurement.seconds,
                    "message": progress_line(spec, trial),
                    **trial.goals,
                }
            )

        with callback.training(int(spec.trials) if math.isfinite(spec.trials) else 0, 0):
            # with several workers, only what comes before the searcher is asked is measured here
            trials = optimize(
                store,
                spec.searcher,
                lambda t, number: measure(spec, folder, t, number, callback.stage),
                spec.trials if workers == 1 else 0,
                spec.seconds,
                _first_suggestions(spec),
                spec.space.recipe.seed,
                progress,
            )
            if workers > 1:
                trials = _optimize_together(spec, folder, storage, store, workers, progress)
        for trial in trials:
            remove_weights(spec, folder, trial.observation.number)
        result = judge(spec, folder, trials, choose(trials), callback)
        files.write_json(folder / RESULT, result)
        files.write_text(folder / "report.html", page(result))
    return result


def open_store(spec: SearchSpec, folder: Path, storage: str | None = None, worker: str = "") -> TrialStore:
    """The trials of a search. storage: URL of a database; None: a journal in the folder."""
    return TrialStore(
        spec.space.space,
        spec.goals,
        spec.limits,
        storage or _journal(folder),
        f"luthier-{spec.fingerprint()}",
        f"{folder.resolve()}{worker}",
    )


def _journal(folder: Path) -> Any:
    lib = load_optuna().storages
    path = str(folder / "study.journal")
    lock = lib.journal.JournalFileOpenLock(path)
    return lib.JournalStorage(lib.journal.JournalFileBackend(path, lock_obj=lock))


def _claim(folder: Path, spec: SearchSpec) -> None:
    """Write down which search the folder holds; refuse a folder that holds another."""
    fingerprint = spec.fingerprint()
    for name in (SPEC, FORMER_SPEC):
        path = folder / name
        if path.is_file():
            if files.read_object(path).get("fingerprint") != fingerprint:
                raise RecipeError(f"{folder} holds another search; choose another folder with --output-dir")
            return
    files.write_json(folder / SPEC, {"fingerprint": fingerprint, "recipe": spec.space.recipe.yaml()})


def _opening_notes(spec: SearchSpec) -> list[str]:
    """What varies and what is improved; the risk of a single seed."""
    dimensions = "; ".join(describe_dimension(dimension_of(dim)) for dim in spec.space.space.dims)
    goals = ", ".join(goal.name for goal in spec.goals)
    notes = [f"search over {dimensions}; goals: {goals}"]
    if len(spec.seeds) == 1:
        notes.append(
            "only one tuning seed: differences may be chance; --seeds 3 makes them reliable at"
            " three times the cost"
        )
    return notes


def _first_suggestions(spec: SearchSpec) -> list[tuple[Suggestion, str]]:
    """The recipe itself, then what an earlier search chose."""
    start = spec.space.start
    first = [(Suggestion(dict(start or {})), "recipe")]
    for point in spec.earlier:
        if point != start:
            first.append((Suggestion(dict(point)), "earlier"))
    return first


def progress_line(spec: SearchSpec, trial: Trial) -> str:
    """Which configuration was measured, and what came of it."""
    observation, measurement = trial.observation, trial.measurement
    text = f"{observation.number}. "
    if trial.kind == "recipe":
        text += "the unchanged recipe"
    else:
        text += describe(observation.point)
    if observation.share < 1:
        text += f" ({format_number(observation.share, True)} of the steps)"
    if measurement.failed:
        outcome = "left out" if measurement.idle else "no numbers"
        return f"{text}: {outcome}, {measurement.failed}"
    values = []
    for goal in spec.goals:
        values.append(f"{goal.name} {format_metric(goal.metric, trial.goals[goal.name])}")
    return f"{text}: {', '.join(values)}"


def _optimize_together(
    spec: SearchSpec,
    folder: Path,
    storage: str | None,
    store: TrialStore,
    workers: int,
    progress: Callable[[Trial], None],
) -> list[Trial]:
    """Workers of a Ray cluster measure; this process reports what they have measured."""
    from luthier.study import cluster

    folder = folder.resolve()
    reported: dict[int, float] = {}
    for trial in store.finished():
        reported[trial.observation.number] = trial.observation.share

    def work(i: int) -> None:
        optimize(
            open_store(spec, folder, storage, f" {i}"),
            spec.searcher,
            lambda t, number: measure(spec, folder, t, number),
            spec.trials,
            spec.seconds * workers,
            seed=spec.space.recipe.seed + i,
            crew=True,
        )

    def look() -> None:
        for trial in store.finished():
            number, share = trial.observation.number, trial.observation.share
            if reported.get(number, 0.0) < share:
                reported[number] = share
                progress(trial)

    cluster.run_workers(workers, work, storage, look)
    return store.finished()
