"""`luthier search`: over tuners, settings, layers, objectives and optimizers, toward several goals at once,
within limits.

A configuration is scored by the mean over tuning seeds; what is found at the end runs again on test seeds,
which no choice has seen, beside the recipe as it was, and both numbers and their gap are told. What was asked
and answered lies in an Optuna storage; the searcher is a function of it, so a search that was killed goes on
as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from luthier.clock import Clock
from luthier.data.load import Data, load_data, sample_rows
from luthier.errors import NotFinite, NothingMoves, OutOfMemory, RecipeError
from luthier.methods.searchers._base import Asked, Searcher, Seen, Space, layers, ranked, tamed
from luthier.methods.searchers._optuna import distributions, optuna
from luthier.recipe.capabilities import columns_of, requirements
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import dry_run, first_run, validate
from luthier.registry import build, did_you_mean, provides_of, spec
from luthier.registry import metric as metric_of
from luthier.report.numbers import format_number as number
from luthier.run.report import plan_runs
from luthier.storage import files
from luthier.study import compare as comparison
from luthier.study.compare import TUNING_SEED, ComparisonSpec, parse_budget
from luthier.study.goals import Goal, Limit, below, fold, goals, limits
from luthier.study.space import SearchSpace, over
from luthier.study.statistics import holm, hypervolume, paired_difference

NO_NUMBERS = (NotFinite, OutOfMemory, NothingMoves)  # a configuration that ends so is left out
FOUND = 3  # configurations that run again on test seeds
EVALUATORS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "elsewhere": "forgetting",
    "generated": "generate",
    "calibration": "calibration",
    "distinct": "diversity",
    "ranking": "preference",
    "reward": "preference",
}
HEAVY = ("checkpoint-*", "*.safetensors", "*.bin")  # of a run that is measured and will not go on


@dataclass(frozen=True)
class Measured:
    """What came of a configuration after a share of its steps."""

    by_seed: Mapping[int, Mapping[str, float]]  # tuning seed -> metric -> value
    took: float = 0.0  # seconds, loading and measuring included
    failed: str = ""  # why it has no numbers, if so
    code: str = ""  # and which outcome that is (luthier.errors)

    def mean(self) -> dict[str, float]:
        said = list(self.by_seed.values())
        shared = [k for k in (said[0] if said else {}) if all(k in s for s in said)]
        return {k: float(np.mean([s[k] for s in said])) for k in shared}


@dataclass(frozen=True)
class Trial:
    """One line of the book: a configuration, measured."""

    seen: Seen
    measured: Measured
    goals: dict[str, float]  # as people read them
    kind: str  # how it came: "recipe", "earlier" or "asked"


# ---------------------------------------------------------------------------------------------- the book


class TrialStore:
    """What was asked and answered, in an Optuna storage: a journal in the search's folder, or any database.

    Several workers may share a database; each goes on only with what it began itself.
    """

    def __init__(
        self,
        space: Space,
        wanted: Sequence[Goal],
        bounds: Sequence[Limit],
        storage: Any = None,
        name: str = "search",
        worker: str = "-",
    ):
        self.space, self.goals, self.limits, self.worker = space, wanted, bounds, worker
        self.lib, self.kind = optuna(), distributions(space)
        try:
            self.study = self.lib.create_study(
                storage=storage, study_name=name, directions=["minimize"] * len(wanted), load_if_exists=True
            )
        except Exception as error:
            if storage is None:
                raise
            raise RecipeError(f"--storage: {str(error).strip().splitlines()[0]}") from None

    def trials(self, state: str) -> list[Any]:
        return [
            t
            for t in self.study.get_trials(deepcopy=False)
            if t.user_attrs.get("state", "RUNNING") == state and "key" in t.user_attrs
        ]

    def tried(self) -> list[Trial]:
        """Everything that was measured, in the order in which it ended."""
        done = sorted(self.trials("done"), key=lambda t: (t.user_attrs["ended"], t.number))
        return [self._tried(t) for t in done]

    def _tried(self, t: Any) -> Trial:
        a = t.user_attrs
        measured = Measured(
            {int(k): v for k, v in a["by_seed"].items()}, a["took"], a["failed"], a.get("code", "")
        )
        mean = measured.mean()
        values = tuple(math.inf if a["failed"] else g.value(mean) for g in self.goals)
        over = sum(limit.over(mean) for limit in self.limits) if not a["failed"] else 1.0 * bool(self.limits)
        seen = Seen(self._number(t), a["point"], values, a["share"], over, a["marks"])
        return Trial(seen, measured, {g.name: g.shown(v) for g, v in zip(self.goals, values)}, a["kind"])

    def _number(self, t: Any) -> int:
        of = t.user_attrs["of"]
        return t.number if of is None else of

    def begin(self, asked: Asked, kind: str = "asked") -> Any:
        """A configuration that is about to be measured: from now on it is not forgotten."""
        key = uuid.uuid4().hex
        point = {k: v for k, v in asked.point.items() if k in self.kind}
        attrs = {
            "key": key,
            "point": dict(asked.point),
            "share": asked.share,
            "of": asked.number,
            "marks": dict(asked.marks),
            "kind": kind,
            "worker": self.worker,
        }
        self.study.add_trial(
            self.lib.trial.create_trial(
                state=self.lib.trial.TrialState.RUNNING,
                params=point,
                distributions={k: self.kind[k] for k in point},
                user_attrs=attrs,
            )
        )
        return next(
            t for t in reversed(self.study.get_trials(deepcopy=False)) if t.user_attrs.get("key") == key
        )

    def begun(self) -> list[Any]:
        """What this worker began and did not end."""
        return [t for t in self.trials("RUNNING") if t.user_attrs["worker"] == self.worker]

    def in_flight(self, seen: Sequence[Seen], before: float = math.inf) -> list[Seen]:
        """What other workers began and did not end, as if it had come out like the median of what was seen.
        before: this trial.
        """
        known = np.array([s.values for s in seen]) if seen else np.zeros((1, len(self.goals)))
        values = tuple(float(v) for v in np.median(tamed(known), 0))
        others = [
            t for t in self.trials("RUNNING") if t.user_attrs["worker"] != self.worker and t.number < before
        ]
        return [
            Seen(
                self._number(t),
                t.user_attrs["point"],
                values,
                t.user_attrs["share"],
                0.0,
                t.user_attrs["marks"],
            )
            for t in others
        ]

    def withdraw(self, t: Any) -> None:
        """As if it had not been begun."""
        self.lib.trial.Trial(self.study, t._trial_id).set_user_attr("state", "withdrawn")
        self.study.tell(t.number, state=self.lib.trial.TrialState.FAIL)

    def end(self, t: Any, measured: Measured) -> Trial:
        states = self.lib.trial.TrialState
        at = self.lib.trial.Trial(self.study, t._trial_id)
        ended = 1 + max((x.user_attrs["ended"] for x in self.trials("done")), default=0)
        said = {
            "by_seed": {str(k): dict(v) for k, v in measured.by_seed.items()},
            "took": measured.took,
            "failed": measured.failed,
            "code": measured.code,
        }
        for key, value in {**said, "ended": ended, "state": "done"}.items():
            at.set_user_attr(key, value)
        tried = self.tried_of(t.number)
        if measured.failed or not all(map(math.isfinite, tried.seen.values)):
            self.study.tell(t.number, state=states.FAIL)
        elif tried.seen.share < 1:  # numbers after part of the steps do not compare with those of whole runs
            self.study.tell(t.number, state=states.PRUNED)
        else:
            self.study.tell(t.number, list(tried.seen.values))
        return tried

    def tried_of(self, number: int) -> Trial:
        return self._tried(next(t for t in self.study.get_trials(deepcopy=False) if t.number == number))


def spent(tried: Sequence[Trial]) -> float:
    """In full runs: one that went on pays only the difference. What moves nothing was not run, and is free up
    to one for each run.
    """
    far: dict[int, float] = {}
    idle = {t.seen.number for t in tried if t.measured.code == NothingMoves.code}
    for t in tried:
        far[t.seen.number] = max(far.get(t.seen.number, 0.0), t.seen.share)
    paid = sum(share for number, share in far.items() if number not in idle)
    return paid + max(0.0, len(idle) - paid)


def optimize(
    book: TrialStore,
    searcher: Searcher,
    measure: Callable[[Any, int], Measured],
    trials: float = math.inf,
    seconds: float = math.inf,
    first: Sequence[tuple[Asked, str]] = (),
    seed: int = 0,
    tell: Callable[[Trial], None] = lambda t: None,
    crew: bool = False,
) -> list[Trial]:
    """Ask, measure, write down, until the budget is spent: trials in full runs, or seconds of measuring.

    What other workers are about stands in the history at the median of what was measured, so that nobody asks
    the same.

    measure: (the trial, the number of its configuration) -> what came of it. first: what is measured before
    anyone is asked. crew: the others are alive, and what they are about counts as spent.
    """
    while True:
        tried = book.tried()
        shown = [t.seen for t in tried if t.seen.point or t.kind != "recipe"]
        others = book.in_flight(shown)
        waiting = book.begun()
        if waiting:
            t = waiting[0]
        elif (begun := sum(x.kind != "asked" for x in tried)) < len(first):
            t = book.begin(*first[begun])
        else:
            used = spent(tried) + sum(s.share for s in others if crew)
            if used >= trials - 1e-9 or sum(x.measured.took for x in tried) >= seconds:
                return tried
            asked = searcher.ask(book.space, [*shown, *others], len(book.goals), Clock(seed))
            there = max((x.seen.share for x in tried if x.seen.number == asked.number), default=0.0)
            if used + asked.share - there > trials + 1e-9 and used > 0:
                return tried
            t = book.begin(asked)
            # others may have begun between reading the book and writing in it: who wrote first goes on
            if crew:
                tried = book.tried()
                used = spent(tried) + sum(s.share for s in book.in_flight(shown, before=t.number))
                if used + asked.share - there > trials + 1e-9 and used > 0:
                    book.withdraw(t)
                    return tried
        tell(book.end(t, measure(t, book._number(t))))


# ---------------------------------------------------------------------------------------------- a search of recipes


@dataclass(frozen=True)
class SearchSpec:
    """A search, wholly said."""

    over: SearchSpace
    goals: tuple[Goal, ...]
    limits: tuple[Limit, ...]
    quality: str  # the metric that found recipes are compared by
    searcher: Any
    trials: float
    seconds: float
    seeds: tuple[int, ...]
    test_seeds: tuple[int, ...]
    earlier: tuple[dict[str, Any], ...] = ()  # points that an earlier search found
    apart: bool = True
    evaluate: tuple[Any, ...] = ()  # what is measured of found recipes, beyond the goals
    # the rows on which they are measured at the end; not given: those that the choice was made on
    test_data: Any = None

    def fingerprint(self) -> str:
        """What makes two searches the same; how long they go on does not."""
        said = [
            self.over.recipe.public(),
            [repr(d) for d in self.over.space.dims],
            [g.name for g in self.goals],
            [x.said for x in self.limits],
            spec(self.searcher),
            self.seeds,
            self.earlier,
        ]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:8]


def seeds_of(said: Any, first: int, option: str) -> tuple[int, ...]:
    """3 -> three from `first` on; '5,6,7' or [5, 6, 7] -> these."""
    if isinstance(said, (list, tuple)):
        found = tuple(int(s) for s in said)
    else:
        words = [w for w in str(said).split(",") if w.strip()]
        try:
            numbers = [int(w) for w in words]
        except ValueError:
            raise RecipeError(
                f"{option}: '{said}' is not a number of seeds, nor seeds such as 5,6,7"
            ) from None
        found = (
            tuple(numbers)
            if "," in str(said)
            else tuple(range(first, first + (numbers[0] if numbers else 0)))
        )
    if not found or len(set(found)) < len(found):
        raise RecipeError(f"{option}: '{said}' is not one or more different seeds")
    return found


def quest(
    recipe: Any,
    going_over: Sequence[str] = (),
    wanted: Sequence[str] = (),
    where: Sequence[str] = (),
    *,
    trials: float | None = None,
    budget: str | None = None,
    sampler: Any = "bayes",
    seeds: Any = 1,
    test_seeds: Any = 3,
    metric: str | None = None,
    earlier: str | Path | None = None,
    test_data: Any = None,
    apart: bool = True,
    changes: Sequence[str] | Mapping[str, Any] | None = None,
) -> SearchSpec:
    """Everything a search needs, checked. Refuses what cannot work before anything is computed."""
    base = Recipe.load(recipe, changes)
    base = base.but(output_dir=None, overwrite=False)
    searcher = build("searcher", sampler)
    optuna()
    tuning, test = seeds_of(seeds, TUNING_SEED, "--seeds"), seeds_of(test_seeds, 0, "--test-seeds")
    if both := sorted(set(tuning) & set(test)):
        raise RecipeError(
            f"seeds {', '.join(map(str, both))} stand under --seeds and under --test-seeds: what is chosen by"
            " a seed is too good on it; keep them apart"
        )
    if (trials is not None) == (budget is not None) and trials is not None:
        raise RecipeError("give --trials (full runs) or --budget (a time), not both")
    if trials is not None and trials < 1:
        raise RecipeError(f"--trials: {trials} is less than one run")
    seconds = math.inf
    if budget is not None:
        what, seconds = parse_budget(budget)
        if what != "seconds":
            raise RecipeError(
                f"--budget: '{budget}' is not a time such as 30m or 2h; say max_steps=... for how long each"
                " run is, --trials for how many"
            )
    if base.plan is not None and len(searcher.shares) > 1:
        raise RecipeError(
            f"--sampler {searcher.name} pauses runs, and a plan has several and no step of its own to pause"
            " at; take tpe, gp, nsga or random"
        )
    rows = load_data(base)
    if test_data is not None:
        _unseen(base, rows, test_data)
    sample = rows.rows[:100]
    quality = metric or _quality(base, sample)
    of = {} if base.plan is None else build("plan", base.plan).front(base)
    aims, bounds = goals(wanted, quality, of), limits(where, quality)
    field = over(base, going_over)
    field = _legal(field, sample)
    base = field.recipe
    tested: list[Any] = []
    if base.evaluate is None:
        asked = {m for g in aims for m in g.front or (g.metric,)} | {x.metric for x in bounds} | {quality}
        base = base.but(evaluate=_evaluators(base, sample, asked))
        tested = [e for e in _usual(base, sample) if e not in (base.evaluate or ())]
    field = replace(field, recipe=base.but(save_steps=100_000, save_total_limit=1, report_to=[]))
    return SearchSpec(
        field,
        aims,
        bounds,
        quality,
        searcher,
        math.inf if trials is None and budget else float(trials or 40),
        seconds,
        tuning,
        test,
        _earlier(earlier, field) if earlier else (),
        apart,
        tuple(tested),
        test_data,
    )


def _unseen(recipe: Recipe, rows: Data, said: Any) -> None:
    """Refuses test rows that a run learns from, or that the choice is made on."""
    test = load_data(recipe.but(eval_data=said)).held_out
    known = {_content(row) for row in (*rows.rows, *rows.held_out)}
    if twice := sum(_content(row) in known for row in test):
        raise RecipeError(
            f"--test-data: {twice} of {len(test)} rows also stand in data or eval_data; what a choice has"
            " seen cannot test it"
        )
    if not test:
        raise RecipeError(f"--test-data: {said} holds no rows")


def _content(row: Mapping[str, Any]) -> str:
    return json.dumps({k: row.get(k) for k in ("prompt", "completions")}, sort_keys=True, default=str)


def _quality(recipe: Recipe, rows: Sequence[dict]) -> str:
    """The metric that `quality` means: pairs ranked right where pairs are learned from, else the loss."""
    aim = recipe.aim()
    return (
        "ranking_accuracy"
        if aim is not None and "pairs" in requirements(aim) and "pairs" in columns_of(rows)
        else "loss"
    )


def _usual(recipe: Recipe, rows: Sequence[dict]) -> list[str]:
    """What a comparison measures of these rows."""
    made = dry_run(first_run(recipe), rows)
    have = (
        columns_of(rows)
        | made.architecture.provides
        | made.estimator.provides
        | provides_of(made.tuner)
        | set(made.roles)
    )
    return [e for e in comparison.DEFAULT_EVALUATORS if requirements(build("evaluator", e)) <= have]


def _evaluators(recipe: Recipe, rows: Sequence[dict], asked: set[str]) -> list[Any]:
    """Those that the goals need, and no others: each run is measured twice."""
    made = dry_run(first_run(recipe), rows)
    have = (
        columns_of(rows)
        | made.architecture.provides
        | made.estimator.provides
        | provides_of(made.tuner)
        | set(made.roles)
        | {"reference"}
    )
    found = []
    for metric in sorted(asked):
        family = metric.split("_")[0].split("/")[0]
        name = EVALUATORS.get(family)
        if name and name not in found:
            if lacking := requirements(build("evaluator", name)) - have:
                raise RecipeError(
                    f"--goals: '{metric}' is measured by evaluator '{name}', which wants"
                    f" {', '.join(sorted(lacking))}: not here"
                )
            found.append(name)
    return found


def _legal(field: SearchSpace, rows: Sequence[dict]) -> SearchSpace:
    """Every choice of methods is rehearsed once; one that cannot work is refused, with its name."""
    space = field.space
    start = space.start()
    for dim in space.dims:
        for value in dim.choices if dim.name in field.methods else ():
            try:
                made = field.recipe_of(space.active({**start, dim.name: value}))
                if made.plan is not None:
                    validate(made, rows, sample_rows)
                dry_run(first_run(made), rows)
            except RecipeError as error:
                raise RecipeError(f"--over {dim.name}={value}: {error}") from None
    for end in (0.0, 1.0):
        made = field.recipe_of(space.walk(lambda d, end=end: d.start if d.choices else d.at(end)))
        made.methods()  # both ends of every range must be legal values
        made.aim()
    return field


def _earlier(folder: str | Path, field: SearchSpace) -> tuple[dict[str, Any], ...]:
    """Points that an earlier search found, as far as this space has their settings."""
    path = Path(folder) / "search.json"
    if not path.is_file():
        raise RecipeError(f"--from: {folder} holds no finished search (search.json)")
    found = json.loads(path.read_text(encoding="utf-8"))["found"]
    points = []
    for one in found:
        point = field.space.active({k: v for k, v in one["point"].items()})
        if not any(k in one["point"] and point.get(k) == one["point"][k] for k in point):
            continue
        if point not in points:
            points.append(point)
    if not points:
        raise RecipeError(f"--from: what {folder} found has no setting in common with this search")
    return tuple(points)


def search(
    recipe: Any = None,
    over: Sequence[str] | str = (),
    goals: Sequence[str] | str = (),
    where: Sequence[str] | str = (),
    *,
    trials: float | None = None,
    budget: str | None = None,
    sampler: Any = "bayes",
    seeds: Any = 1,
    test_seeds: Any = 3,
    metric: str | None = None,
    earlier: str | Path | None = None,
    test_data: Any = None,
    storage: str | None = None,
    folder: str | Path | None = None,
    workers: int = 1,
    apart: bool = True,
    watch: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """Search for better configurations of a recipe; settings: keys of the recipe.

    >>> luthier.search("recipe.yaml", over="tuner=lora|ssf, learning_rate", goals="quality, parameters",
    trials=40)
    """
    several = lambda x: [x] if isinstance(x, str) else list(x)
    made = quest(
        recipe,
        several(over),
        several(goals),
        several(where),
        trials=trials,
        budget=budget,
        sampler=sampler,
        seeds=seeds,
        test_seeds=test_seeds,
        metric=metric,
        earlier=earlier,
        test_data=test_data,
        apart=apart,
        changes=settings,
    )
    return conduct(made, Path(folder) if folder else None, storage, watch, workers)


def conduct(
    made: SearchSpec,
    folder: Path | None = None,
    storage: str | None = None,
    watch: Any = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Search, run what was found on test seeds, and say what came of it. Also written to FOLDER/search.json
    and report.html.

    workers: how many of a Ray cluster measure side by side (luthier/cluster.py).
    """
    from luthier.report.console import Callback
    from luthier.report.search import page

    watch = watch or Callback()
    folder = Path(folder or Path("runs") / f"search-{made.fingerprint()}")
    with files.exclusive(folder):
        _own(folder, made)
        book = _book(made, folder, storage)
        begins = made.over.begins
        first = [
            (Asked(dict(begins or {})), "recipe"),
            *((Asked(dict(p)), "earlier") for p in made.earlier if p != begins),
        ]
        for sentence in _told(made):
            watch.warn(sentence)

        def tell(t: Trial) -> None:
            watch.step(
                {
                    "step": int(spent(book.tried()) + 1e-9),
                    "seconds": t.measured.took,
                    "said": went(made, t),
                    **t.goals,
                }
            )

        with watch.training(int(made.trials) if math.isfinite(made.trials) else 0, 0):
            alone = lambda trials: optimize(
                book,
                made.searcher,
                lambda t, i: _measure(made, folder, t, i),
                trials,
                made.seconds,
                first,
                made.over.recipe.seed,
                tell,
            )
            # what comes first is measured before anybody asks
            tried = alone(made.trials if workers == 1 else 0)
            if workers > 1:
                tried = _together(made, folder, storage, book, workers, tell)
        found = best(tried)
        for t in tried:
            _lighten(folder, made, t.seen.number)
        result = _tested(made, folder, tried, found, watch)
        files.write_json(folder / "search.json", result)
        files.write_text(folder / "report.html", page(result))
    return result


def went(made: SearchSpec, t: Trial) -> str:
    """What was tried, and what came of it, in a line."""
    what = "the recipe as it is" if t.kind == "recipe" else told(t.seen.point)
    far = f" ({number(t.seen.share, True)} of the steps)" if t.seen.share < 1 else ""
    if t.measured.failed:
        came = f"{'left out' if t.measured.code == NothingMoves.code else 'no numbers'}, {t.measured.failed}"
    else:
        came = ", ".join(f"{g.name} {number(t.goals[g.name], metric_of(g.metric).is_share)}" for g in made.goals)
    return f"{t.seen.number}. {what}{far}: {came}"


def _book(made: SearchSpec, folder: Path, storage: str | None, worker: str = "") -> TrialStore:
    name = f"luthier-{made.fingerprint()}"
    return TrialStore(
        made.over.space,
        made.goals,
        made.limits,
        storage or _journal(folder),
        name,
        f"{folder.resolve()}{worker}",
    )


def _together(
    made: SearchSpec,
    folder: Path,
    storage: str | None,
    book: TrialStore,
    workers: int,
    tell: Callable[[Trial], None],
) -> list[Trial]:
    """Workers of a Ray cluster; this process looks on."""
    from luthier.study import cluster

    folder, told = folder.resolve(), {t.seen.number: t.seen.share for t in book.tried()}

    def work(i: int) -> None:
        own = _book(made, folder, storage, f" {i}")
        optimize(
            own,
            made.searcher,
            lambda t, n: _measure(made, folder, t, n),
            made.trials,
            made.seconds * workers,
            (),
            made.over.recipe.seed + i,
            crew=True,
        )

    def look() -> None:
        for t in book.tried():
            if told.get(t.seen.number, 0.0) < t.seen.share:
                told[t.seen.number] = t.seen.share
                tell(t)

    cluster.workers(workers, work, storage, look)
    return book.tried()


def _told(made: SearchSpec) -> list[str]:
    runs = len(made.seeds)
    said = [
        f"over {', '.join(d.name for d in made.over.space.dims)}; toward"
        f" {', '.join(g.name for g in made.goals)}"
    ]
    if runs == 1:
        said.append(
            "one tuning seed: what is found is partly luck; --seeds 3 tells luck from merit, at three times"
            " the cost"
        )
    return said


def _journal(folder: Path) -> Any:
    lib = optuna()
    backend = lib.storages.journal.JournalFileBackend(
        str(folder / "study.journal"),
        lock_obj=lib.storages.journal.JournalFileOpenLock(str(folder / "study.journal")),
    )
    return lib.storages.JournalStorage(backend)


def _own(folder: Path, made: SearchSpec) -> None:
    state = folder / "quest.json"
    known = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else None
    if known and known["fingerprint"] != made.fingerprint():
        raise RecipeError(f"{folder} holds another search; give another --to")
    if known is None:
        files.write_json(state, {"fingerprint": made.fingerprint(), "recipe": made.over.recipe.yaml()})


# ---------------------------------------------------------------------------------------------- measuring


def _measure(made: SearchSpec, folder: Path, t: Any, index: int) -> Measured:
    """A configuration on every tuning seed, each in a run of its own, up to its share of the steps."""
    point, share = t.user_attrs["point"], t.user_attrs["share"]
    recipe = made.over.recipe if t.user_attrs["kind"] == "recipe" else made.over.recipe_of(point)
    by_seed: dict[int, dict[str, float]] = {}
    began = time.perf_counter()
    for seed in made.seeds:
        where = folder / "trials" / f"{index}-{seed}"
        try:
            if not (where / "report.json").is_file():
                _run(made, recipe.but(seed=seed), where, share)
        except RecipeError as error:
            if t.user_attrs["kind"] != "recipe" and isinstance(error, NO_NUMBERS):
                return Measured({}, time.perf_counter() - began, str(error), error.code)
            raise RecipeError(
                f"configuration {index} ({told(point) or 'the recipe as it is'}), seed {seed}: {error}"
            ) from None
        by_seed[seed] = numbers(where, made.goals)
        if blind := [said for g in made.goals if (said := below(g, points(where)))]:
            raise RecipeError(
                f"configuration {index} ({told(point) or 'the recipe as it is'}), seed {seed}: {blind[0]},"
                " the same point for all configurations; begin the search anew from a point that none of"
                " them reaches"
            )
        if t.user_attrs["kind"] == "recipe":
            _all_there(made, by_seed[seed])
    if share >= 1:
        _lighten(folder, made, index)
    return Measured(by_seed, time.perf_counter() - began)


def _run(made: SearchSpec, recipe: Recipe, where: Path, share: float) -> None:
    until = share if share < 1 else None
    if made.apart:
        from luthier.run import subprocess as apart

        apart.tune({k: v for k, v in recipe.public().items() if k != "output_dir"}, where, until)
        return
    from luthier.run.run import perform

    perform(recipe, where, stop_at=until)


def _ended(run: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """The report of a finished or paused run, and what it measured last."""
    done = run / "report.json"
    said = json.loads((done if done.is_file() else run / "paused.json").read_text(encoding="utf-8"))
    return said, said["after"] if done.is_file() else said["metrics"]


def points(run: Path) -> list[dict[str, float]]:
    """What each run of a plan measured; of one run, what it measured."""
    said, after = _ended(run)
    runs = [folder / "report.json" for folder in plan_runs(said)]
    return [json.loads(p.read_text(encoding="utf-8"))["after"] for p in runs if p.is_file()] or [after]


def numbers(run: Path, wanted: Sequence[Goal] = ()) -> dict[str, float]:
    """Every number of a finished or paused run; fronts of a plan's runs by what their goals tell them by."""
    said, after = _ended(run)
    stats = said.get("stats", {})
    known = {**stats, **({"trained": stats["moving"]} if "moving" in stats else {}), **after}
    found = {k: float(v) for k, v in known.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    for goal in (g for g in wanted if g.front):
        if (one := fold(goal, points(run))) is not None:
            found[goal.metric] = one
    return found


def _all_there(made: SearchSpec, found: Mapping[str, float]) -> None:
    """The recipe as it is runs first: a goal that it does not measure is refused then."""
    for name, metric in [(g.name, g.metric) for g in made.goals] + [(x.said, x.metric) for x in made.limits]:
        if metric not in found:
            raise RecipeError(
                f"'{name}': the recipe measured no '{metric}'{did_you_mean(metric, found)}; see `evaluate`"
            )


def _lighten(folder: Path, made: SearchSpec, index: int) -> None:
    """A run that is measured and will not go on leaves its numbers, not its weights."""
    for seed in made.seeds:
        for pattern in HEAVY:
            for path in (folder / "trials" / f"{index}-{seed}").glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def told(point: Mapping[str, Any]) -> str:
    """'tuner lora, lora.r 16, learning_rate 0.003'; layers as the list of those that move."""
    kept = [k.partition(".")[2] for k, v in point.items() if k.startswith("layers.") and v]
    flags = any(k.startswith("layers.") for k in point)
    plain = [
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in point.items()
        if not k.startswith("layers.")
    ]
    return ", ".join([*plain, *(["layers " + (" ".join(kept) or "none")] if flags else [])])


# ---------------------------------------------------------------------------------------------- what was found


def best(tried: Sequence[Trial], most: int = FOUND) -> list[Trial]:
    """Of whole runs within the limits: the best, or of the front those that cover most of it. The recipe
    itself is not one. Equals are taken by what they are, so that the order in which they were measured
    decides nothing."""
    whole = [
        t
        for t in tried
        if t.seen.share >= 1
        and not t.measured.failed
        and t.seen.over <= 0
        and all(map(math.isfinite, t.seen.values))
    ]
    whole = list({t.seen.number: t for t in whole}.values())
    new = sorted(
        (t for t in whole if t.kind != "recipe"),
        key=lambda t: json.dumps(dict(t.seen.point), sort_keys=True, default=str),
    )
    if not new:
        return []
    if len(new[0].seen.values) == 1:
        order = {s.number: i for i, s in enumerate(ranked([t.seen for t in new]))}
        return sorted(new, key=lambda t: order[t.seen.number])[:most]
    values = np.array([t.seen.values for t in new])
    on = [t for t, level in zip(new, layers(values)) if level == 0]
    low, high = values.min(0), values.max(0)
    scaled = {
        t.seen.number: (np.array(t.seen.values) - low) / np.where(high > low, high - low, 1.0) for t in on
    }
    chosen = [min(on, key=lambda t: t.seen.values[0])]  # the best of the first goal is always among them
    while len(chosen) < min(most, len(on)):
        left = [t for t in on if t not in chosen]
        covered = lambda t: hypervolume(
            [scaled[x.seen.number] for x in (*chosen, t)], [1.1] * values.shape[1]
        )
        chosen.append(max(left, key=covered))
    return chosen


def front(tried: Sequence[Trial]) -> list[int]:
    """Numbers of the whole runs within the limits that nobody beats in every goal."""
    some = [t for t in tried if t.seen.share >= 1 and not t.measured.failed and t.seen.over <= 0]
    if not some:
        return []
    return sorted(
        {
            t.seen.number
            for t, level in zip(some, layers(np.array([t.seen.values for t in some])))
            if level == 0
        }
    )


def _tested(
    made: SearchSpec, folder: Path, tried: Sequence[Trial], found: Sequence[Trial], watch: Any
) -> dict[str, Any]:
    """What was found beside the recipe as it was, on seeds that no choice has seen."""
    arms = {
        "recipe": made.over.recipe,
        **{f"found-{i + 1}": made.over.recipe_of(t.seen.point) for i, t in enumerate(found)},
    }
    result: dict[str, Any] = {
        "recipe": made.over.recipe.yaml(),
        "goals": [{"name": g.name, "metric": g.metric, "up": g.up} for g in made.goals],
        "limits": [x.said for x in made.limits],
        "over": [_dim_told(d) for d in made.over.space.dims],
        "sampler": spec(made.searcher),
        "seeds": list(made.seeds),
        "test_seeds": list(made.test_seeds),
        "test_data": made.test_data,
        "trials": [_line(t, folder) for t in tried],
        "front": front(tried),
        "spent": spent(tried),
        "took": sum(t.measured.took for t in tried),
        "date": str(date.today()),
        "folder": str(folder),
        "model": made.over.recipe.model,
        "found": [],
        "comparison": None,
    }
    if not found:
        result["sentence"] = (
            "Nothing was found: no configuration but the recipe itself was measured to its end within the"
            " limits."
        )
        return result
    for name, t in zip(list(arms)[1:], found):
        text = (
            f"# Found by luthier search: {told(t.seen.point)}.\n"
            + made.over.recipe_of(t.seen.point).but(output_dir=None).yaml()
        )
        files.write_text(folder / f"{name}.yaml", text)
    watch.stage("on test seeds")
    rows = {} if made.test_data is None else {"eval_data": made.test_data}
    arms = {name: r.but(evaluate=[*(r.evaluate or ()), *made.evaluate], **rows) for name, r in arms.items()}
    study = ComparisonSpec(
        arms,
        len(made.test_seeds),
        None,
        made.quality,
        False,
        made.apart,
        together=False,
        seed_values=made.test_seeds,
    )
    compared = comparison.run_comparison(study, folder / f"test-{study.fingerprint()}", watch)
    base = next((t for t in tried if t.kind == "recipe"), None)
    lines = []
    for name, t in (*([("recipe", base)] if base else []), *zip(list(arms)[1:], found)):
        runs = [Path(r) for r in compared["arms"][name]["runs"]]
        ended = [numbers(r, made.goals) for r in runs if (r / "report.json").is_file()]
        each = {
            g.name: [e[g.metric] for e in ended]
            for g in made.goals
            if ended and all(g.metric in e for e in ended)
        }
        test = {k: float(np.mean(v)) for k, v in each.items() if all(map(math.isfinite, v))}
        tuning = {k: v if math.isfinite(v) else None for k, v in t.goals.items()}
        gap = {
            g.name: (t.goals[g.name] - test[g.name]) * (1 if g.up else -1)
            for g in made.goals
            if g.name in test and tuning[g.name] is not None
        }
        seen = {g.name: each[g.name] for g in made.goals if g.front and g.name in test}
        lines.append(
            {
                "name": name,
                "number": t.seen.number,
                "point": dict(t.seen.point),
                "said": told(t.seen.point),
                "tuning": tuning,
                "test": test,
                "gap": gap,
                "by_seed": seen,
            }
        )
        blind = [
            f"{r.name}: {said}"
            for r in runs
            if (r / "report.json").is_file()
            for g in made.goals
            if (said := below(g, points(r)))
        ]
        compared["notes"] += [f"{said}; what lies there counts nothing" for said in blind]
    beside(lines)
    compared["notes"] += unmoved(made.goals, tried)
    result |= {
        "found": [x for x in lines if x["name"] != "recipe"],
        "start": next((x for x in lines if x["name"] == "recipe"), None),
    }
    result["comparison"] = compared
    result["sentence"] = sentence(made, tried, lines, compared)
    return result


def sentence(made: SearchSpec, tried: Sequence[Trial], lines: Sequence[Mapping], compared: Mapping) -> str:
    """The answer, on test seeds; what it was on tuning seeds, where the goal is one."""
    said = f"{len({t.seen.number for t in tried})} configurations, {spent(tried):.3g} full runs: "
    said += compared["sentence"][0].lower() + compared["sentence"][1:].rstrip(".")
    if made.goals[0].front and len(lines) > 1:
        return said.split(": ")[0] + f": {_fronts(made.goals[0], lines)}."
    top = max((x for x in lines if x["name"] != "recipe"), key=lambda x: -_first(x, made), default=None)
    goal = made.goals[0]
    if top and goal.name in top["test"]:
        share, where = (
            metric_of(goal.metric).is_share,
            ("test seeds" if made.test_data is None else "test seeds and rows"),
        )
        said += (
            f" ({where}; {top['name']} had {number(top['tuning'][goal.name], share)} on the tuning seeds,"
            f" {number(top['test'][goal.name], share)} here)"
        )
    return said + "."


def unmoved(wanted: Sequence[Goal], tried: Sequence[Trial]) -> list[str]:
    """Goals that came out alike whatever was tried, where more than one thing was."""
    whole = {t.seen.number: t.goals for t in tried if t.seen.share >= 1 and not t.measured.failed}
    seen = {g.name: {goals[g.name] for goals in whole.values()} for g in wanted}
    return [
        f"{name} was {number(min(values))} in all {len(whole)} configurations: nothing that was searched"
        " moves it"
        for name, values in seen.items()
        if len(whole) > 1 and len(values) == 1
    ]


def beside(lines: Sequence[dict[str, Any]]) -> None:
    """Adds to each line the intervals of its fronts' means over test seeds, `interval`, and of what was found
    its paired difference from the recipe, `beyond`. p values are Holm's, over all that was found."""
    for goal in lines[0]["by_seed"] if lines else ():
        there = [x for x in lines if len(x["by_seed"].get(goal, ())) > 1]
        for x in there:
            column = np.array([x["by_seed"][goal]]).T
            mean = paired_difference(column, np.zeros_like(column))
            x.setdefault("interval", {})[goal] = (mean.low, mean.high)
        start = next((x for x in there if x["name"] == "recipe"), None)
        new = [
            x
            for x in there
            if start and x is not start and len(x["by_seed"][goal]) == len(start["by_seed"][goal])
        ]
        apart = [
            paired_difference(np.array([x["by_seed"][goal]]).T, np.array([start["by_seed"][goal]]).T)
            for x in new
            if start
        ]
        for x, d, p in zip(new, apart, holm([d.p for d in apart])):
            sure = bool(p < comparison.ALPHA and d.excludes_zero)
            x.setdefault("beyond", {})[goal] = {
                "mean": d.mean,
                "low": d.low,
                "high": d.high,
                "p": p,
                "apart": sure,
            }


def _fronts(goal: Goal, lines: Sequence[Mapping]) -> str:
    """What was chosen on tuning seeds beside the recipe, on test seeds, in a front's number."""

    def told(x: Mapping) -> str:
        low, high = x.get("interval", {}).get(goal.name, (0, 0))
        return f"{x['name']} {number(x['test'].get(goal.name))}" + f" ({number(low)} to {number(high)})" * (
            low < high
        )

    top, start = (
        next(x for x in lines if x["name"] != "recipe"),
        next((x for x in lines if x["name"] == "recipe"), None),
    )
    said, d = f"{goal.name} on test seeds: {told(top)}", top.get("beyond", {}).get(goal.name)
    if start is None:
        return said
    said += f", the {told(start)}"
    if d is None:
        return said + "; one seed, or one without a number: nothing is said of chance"
    if not d["apart"]:
        return said + "; no difference seen"
    size, ends = abs(d["mean"]), sorted((abs(d["low"]), abs(d["high"])))
    return (
        said
        + f"; {'better' if (d['mean'] > 0) == goal.up else 'worse'} by {number(size)} ({number(ends[0])} to"
        f" {number(ends[1])})"
    )


def _first(line: Mapping, made: SearchSpec) -> float:
    goal = made.goals[0]
    return goal.value({goal.metric: line["test"].get(goal.name, math.nan)})


def _line(t: Trial, folder: Path) -> dict[str, Any]:
    finite = {k: v if math.isfinite(v) else None for k, v in t.goals.items()}
    return {
        "number": t.seen.number,
        "point": dict(t.seen.point),
        "said": told(t.seen.point) or "the recipe as it was",
        "share": t.seen.share,
        "goals": finite,
        "over": t.seen.over,
        "by_seed": {str(k): dict(v) for k, v in t.measured.by_seed.items()},
        "took": t.measured.took,
        "failed": t.measured.failed,
        "code": t.measured.code,
        "kind": t.kind,
        "runs": [str(folder / "trials" / f"{t.seen.number}-{s}") for s in t.measured.by_seed],
    }


def _dim_told(d: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"name": d.name}
    said |= {"choices": list(d.choices)} if d.choices else {"low": d.low, "high": d.high, "log": d.log}
    return {**said, **({"when": list(d.when)} if d.when else {})}
