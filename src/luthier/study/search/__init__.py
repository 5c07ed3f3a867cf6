"""Search for better configurations of a recipe: tuners, settings, layers, objectives and optimizers, toward
one goal or several, within limits.

A configuration is scored by the mean over tuning seeds. Those chosen at the end run again on test seeds, by
which nothing was chosen, beside the recipe as it was; both numbers and their gap are reported. Trials lie in
an Optuna storage, and the searcher is a function of it, so an interrupted search resumes as if it had not
been.

`spec.py` says what is searched and refuses what cannot work, `optimize.py` is the loop, `trials.py` its
memory, `measure.py` runs a configuration, `verdict.py` turns trials into the result, and `run.py` puts them
together in a folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier import compat
from luthier.errors import RecipeError
from luthier.report.console import Callback
from luthier.study.search.measure import measure
from luthier.study.search.optimize import optimize
from luthier.study.search.run import open_store, progress_line, run_search
from luthier.study.search.spec import DEFAULT_SEARCHER, SearchSpec, parse_seeds, search_spec
from luthier.study.search.trials import Measurement, Trial, TrialStore, full_runs
from luthier.study.search.verdict import add_intervals, choose, unmoved

__all__ = [
    "Measurement",
    "SearchSpec",
    "Trial",
    "TrialStore",
    "add_intervals",
    "choose",
    "full_runs",
    "measure",
    "open_store",
    "optimize",
    "parse_seeds",
    "progress_line",
    "run_search",
    "search",
    "search_spec",
    "unmoved",
]

# arguments of version 0.1
FORMER = {
    "over": "space",
    "where": "constraint",
    "folder": "output_dir",
    "apart": "subprocesses",
    "watch": "callback",
}


@compat.session()
def search(
    recipe: Any = None,
    space: Sequence[str] | str = (),
    goals: Sequence[str] | str = (),
    constraint: Sequence[str] | str = (),
    *,
    trials: float | None = None,
    budget: str | None = None,
    sampler: Any = DEFAULT_SEARCHER,
    seeds: Any = 1,
    test_seeds: Any = 3,
    metric: str | None = None,
    earlier: str | Path | None = None,
    test_data: Any = None,
    storage: str | None = None,
    output_dir: str | Path | None = None,
    workers: int = 1,
    subprocesses: bool = True,
    callback: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """Search for better configurations of a recipe and return the result, which is also written to
    OUTPUT_DIR/search.json and report.html.

    Args:
        recipe: its file, mapping or Recipe.
        space: what varies, as "tuner.r=4..64 log"; nothing: the learning rate, and what the recipe's methods
            declare.
        goals: what is improved, as "quality, memory" or any metric.
        constraint: limits, as "memory <= 8GB".
        trials: full runs at most, 40 if there is no budget either.
        budget: a time, as "2h".
        sampler: a searcher, by name or with its settings.
        seeds: how many, or which; a configuration is chosen by its mean over them.
        test_seeds: how many, or which; the chosen configurations are tested on them.
        metric: what the goal `quality` means; None: the loss, or ranking accuracy of pairs.
        earlier: the folder of an earlier search, whose results are measured first.
        test_data: rows on which the chosen configurations are tested; None: the held-out rows.
        storage: URL of a database, as Optuna has it; None: a journal in the folder.
        output_dir: default runs/search-<fingerprint>.
        workers: of a Ray cluster, side by side.
        subprocesses: each run in a process of its own.
        callback: called as the runs go on.
        settings: keys of the recipe.

    Raises:
        RecipeError: it cannot be searched.

    Examples:
        >>> luthier.search(
        ...     "recipe.yaml", space="tuner=lora|ssf, learning_rate", goals="quality, parameters", trials=40
        ... )
    """
    arguments = {
        "space": space,
        "constraint": constraint,
        "output_dir": output_dir,
        "subprocesses": subprocesses,
        "callback": callback,
    }
    notes = _take_former(arguments, settings)
    callback = arguments["callback"] or Callback()
    for note in notes:
        callback.warn(note)
    spec = search_spec(
        recipe,
        _listed(arguments["space"]),
        _listed(goals),
        _listed(arguments["constraint"]),
        trials=trials,
        budget=budget,
        sampler=sampler,
        seeds=seeds,
        test_seeds=test_seeds,
        metric=metric,
        earlier=earlier,
        test_data=test_data,
        subprocesses=arguments["subprocesses"],
        changes=settings,
    )
    folder = arguments["output_dir"]
    return run_search(spec, Path(folder) if folder else None, storage, callback, workers)


def _take_former(arguments: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Move arguments of version 0.1 to their new names; a note for each. Raises RecipeError for both."""
    notes = []
    for former, name in FORMER.items():
        if former not in settings:
            continue
        if arguments[name] not in ((), None, True):
            raise RecipeError(f"{former} is now called {name}; keep one of them")
        arguments[name] = settings.pop(former)
        notes.append(f"{former} is now called {name}")
    return notes


def _listed(texts: Sequence[str] | str) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
