"""Side by side: the same rows, the same seeds, the same budget, many ways to tune, one fair answer.

An arm is a recipe; every arm runs with every seed, each run in a process of its own (so that its memory and
time are its own). All are measured on the same held-out rows, and compared pair by pair over seeds and rows
(paired.py): a difference is only said where its own interval, corrected for all pairs that were looked at,
supports it. Everything lies in one folder; the same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.load import load_data, sample_rows
from luthier.errors import RecipeError
from luthier.recipe.capabilities import columns_of, requirements
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import dry_run, first_run, validate
from luthier.registry import build, did_you_mean, provides_of
from luthier.report.numbers import number, says
from luthier.storage import store
from luthier.study.statistics import difference, front, holm, interval

# where no arm says otherwise
MEASURED = ("loss", "accuracy", "generate", "forgetting", "calibration", "diversity")
# must be the same, or nothing is comparable
ALIKE = ("data", "eval_data", "max_length", "chat_template", "evaluate")
# may differ, and it is said
TOLD = ("model", "dtype", "per_device_train_batch_size", "gradient_accumulation_steps")
COSTS = {  # what a run cost, out of its stats; None: neither way is better
    "trained": ("numbers that move", False),
    "peak_memory_mb": ("peak memory (MB)", False),
    "seconds": ("seconds in steps", False),
    "tokens_per_second": ("tokens/s", True),
}
# of the front, beside the metric
GOALS = ("elsewhere_loss", "elsewhere_accuracy", "trained", "peak_memory_mb", "seconds")
RUNGS = (0.25, 0.5)  # shares of the run at which arms that cannot win are stopped
WRONG = 0.05  # how often, of all pairs of a metric together, a difference may be claimed where there is none
TUNING_SEED = 1000  # of the runs that pick learning rates: no run that counts has it
CREW = 8  # runs side by side at most
PILOT = 6  # steps by which a budget of time or tokens is turned into steps


# ---------------------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Study:
    """Arms, and how they are compared."""

    arms: dict[str, Recipe]
    seeds: int = 3
    # "30m" of steps, "200k tokens" or "500 steps", for each arm and seed; None: as the recipes say
    budget: str | None = None
    metric: str = "loss"  # by which arms are ranked and stopped
    stop_early: bool = True  # stop arms that cannot win, where there are more than two
    apart: bool = True  # each run in a process of its own
    # LoRAs that differ in rank, rate, targets or seed side by side on one base: no peak of memory is theirs
    # alone
    together: bool = False
    drawn: tuple[int, ...] = ()  # the seeds themselves, in place of 0, 1, 2, ...
    # of which each arm takes its best, by a run with a seed of its own
    learning_rates: tuple[float, ...] = ()

    def fingerprint(self) -> str:
        said = [
            {k: r.public() for k, r in self.arms.items()},
            self.seeds,
            self.budget,
            self.metric,
            self.stop_early,
        ]
        said += [x for x in (self.learning_rates, self.drawn) if x]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:8]


def arms_of(
    recipes: Sequence[str], changes: Sequence[str] = (), tuners: str = "", objectives: str = ""
) -> dict[str, Recipe]:
    """Recipes by the stems of their files, or every legal combination of tuners and objectives on one recipe."""
    if len(recipes) > 1 and (tuners or objectives):
        raise RecipeError("--tuners and --objectives vary one recipe; give one at most")
    if tuners or objectives:
        return _grid(
            Recipe.load(Path(recipes[0]) if recipes else None, changes), _listed(tuners), _listed(objectives)
        )
    if len(recipes) < 2:
        raise RecipeError("a comparison wants two recipes or more, or --tuners a,b,c")
    stems = [Path(r).stem for r in recipes]
    names = (
        stems
        if len(set(stems)) == len(stems)
        else [re.sub(r"[^\w.-]+", "-", str(Path(r).with_suffix(""))).strip("-") for r in recipes]
    )
    if len(set(names)) < len(names):
        raise RecipeError(f"two of these recipes are the same file: {', '.join(recipes)}")
    return {name: Recipe.load(Path(path), changes) for name, path in zip(names, recipes)}


def _listed(said: str) -> list[str]:
    return [word.strip() for word in said.split(",") if word.strip()]


def rates_of(said: str) -> tuple[float, ...]:
    """'1e-4,1e-3' as numbers."""
    try:
        return tuple(float(word) for word in _listed(said))
    except ValueError:
        raise RecipeError(f"--learning-rates: '{said}' is not numbers such as 1e-4,1e-3") from None


def _grid(base: Recipe, tuners: list[str], objectives: list[str]) -> dict[str, Recipe]:
    arms = {}
    for t in tuners or [None]:
        for o in objectives or [None]:
            name = "-".join(
                re.sub(r"[^\w.]+", "_", x).strip("_")
                for x in (t, o if len(objectives) > 1 or not t else None)
                if x
            )
            arms[name] = base.but(**{k: v for k, v in (("tuner", t), ("objective", o)) if v})
    return arms


def fair(study: Study) -> tuple[dict[str, Recipe], list[str]]:
    """The arms as they will run, all measured alike, and what a reader must know. Refuses what cannot be
    compared.
    """
    if len(study.arms) < 2:
        raise RecipeError("a comparison wants two arms or more")
    if not 1 <= study.seeds <= TUNING_SEED:
        raise RecipeError(f"--seeds: {study.seeds} is not a number of runs between 1 and {TUNING_SEED}")
    if study.learning_rates and (len(set(study.learning_rates)) < 2 or min(study.learning_rates) <= 0):
        raise RecipeError(
            "--learning-rates: two or more above 0 to choose from, not"
            f" {', '.join(map(str, study.learning_rates))}"
        )
    first, notes = next(iter(study.arms)), []
    plans = [name for name, recipe in study.arms.items() if recipe.plan is not None]
    if plans and study.budget:
        raise RecipeError(
            f"--budget: {plans[0]} is a plan of several runs, which no budget divides; say max_steps in the"
            " recipes"
        )
    for name, recipe in study.arms.items():
        for key in ALIKE:
            was, now = getattr(study.arms[first], key), getattr(recipe, key)
            if was != now:
                raise RecipeError(
                    f"arms {first} and {name} differ in {key} ({_short(was)} and {_short(now)}): they would"
                    " not be measured alike"
                )
        for key in TOLD:
            was, now = getattr(study.arms[first], key), getattr(recipe, key)
            if was != now:
                notes.append(f"{name} differs from {first} in {key}: {_short(now)}, not {_short(was)}")
    rows = load_data(study.arms[first])
    arms = {}
    for name, recipe in study.arms.items():
        try:
            if recipe.plan is not None:
                validate(recipe, rows.rows[:100], sample_rows)
            parts = dry_run(first_run(recipe), rows.rows[:100])
        except RecipeError as error:
            raise RecipeError(f"arm {name}: {error}") from None
        if recipe.evaluate is None:
            have = (
                columns_of(rows.rows[:100])
                | parts.architecture.provides
                | parts.estimator.provides
                | provides_of(parts.tuner)
                | set(parts.roles)
            )
            recipe = recipe.but(evaluate=[e for e in MEASURED if requirements(build("evaluator", e)) <= have])
        arms[name] = recipe.but(save_steps=0.5, save_total_limit=1, report_to=[])
    asked = [
        tuple(e if isinstance(e, str) else e.get("name") for e in r.evaluate or ()) for r in arms.values()
    ]
    if len(set(asked)) > 1:
        shared = [e for e in asked[0] if all(e in other for other in asked)]
        notes.append(f"only what every arm can be asked is measured: {', '.join(shared)}")
        arms = {name: r.but(evaluate=shared) for name, r in arms.items()}
    if plans:
        notes.append(
            f"{_and(plans)}: time is that of all its runs together, memory that of the largest; no arm is"
            " stopped early"
        )
    if not rows.held_out:
        notes.append("nothing is held out: arms are compared on the rows they were trained on")
    if study.seeds == 1:
        notes.append("one seed: differences are those of these runs, and another seed may say otherwise")
    return arms, notes


def _short(value: Any) -> str:
    return str(value)[:60]


# ---------------------------------------------------------------------------------------------- budget


BUDGET = re.compile(r"([\d.]+)\s*([kKM]?)\s*(s|m|min|h|steps?|tokens?|)")
SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600}


def understood(budget: str) -> tuple[str, float]:
    """'30m' -> ('seconds', 1800), '500' -> ('steps', 500), '2M tokens' -> ('tokens', 2e6)."""
    found = BUDGET.fullmatch(budget.strip())
    if not found or (found[2] and found[3] in SECONDS):
        raise RecipeError(
            f"--budget: '{budget}' is not a time (30m, 90s, 2h), steps (500 steps) or tokens (200k tokens)"
        )
    size = float(found[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6}[found[2]]
    if found[3] in SECONDS:
        return "seconds", size * SECONDS[found[3]]
    return ("tokens" if found[3].startswith("token") else "steps"), size


def budgeted(study: Study, arms: dict[str, Recipe], folder: Path, watch: Any) -> dict[str, Recipe]:
    """Every arm with its number of steps. Time and tokens are turned into steps by a timed pilot, once: what
    it found is kept.
    """
    if study.budget is None:
        return arms
    what, size = understood(study.budget)
    if what == "steps":
        return {name: r.but(max_steps=max(1, int(size))) for name, r in arms.items()}
    kept = folder / "budget.json"
    steps = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for name, recipe in arms.items():
        if name not in steps:
            where = folder / "pilot" / name
            watch.stage(f"{name}: {PILOT} steps, to see how many fit into {study.budget}")
            _run(
                study,
                recipe.but(max_steps=PILOT, evaluate=[], lr_scheduler_type="constant"),
                where,
                None,
                None,
            )
            lines = store.read_rows(where / "metrics.jsonl")[1:]  # the first step also warms up
            each = (
                float(np.median([line["seconds"] for line in lines]))
                if what == "seconds"
                else float(np.mean([line["tokens"] for line in lines]))
            )
            steps[name] = max(1, int(size / each))
            store.write_json(kept, steps)
    return {name: r.but(max_steps=steps[name]) for name, r in arms.items()}


def swept(
    study: Study, arms: dict[str, Recipe], folder: Path, watch: Any
) -> tuple[dict[str, Recipe], list[str]]:
    """Every arm at the learning rate that was best for it, and what a reader must know of that. What was
    found is kept.
    """
    if not study.learning_rates:
        return arms, []
    kept, rates = folder / "learning_rates.json", sorted(set(study.learning_rates))
    found: dict[str, dict[str, float | None]] = (
        json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    )
    todo = [(name, rate) for name in arms for rate in rates if f"{rate:g}" not in found.get(name, {})]
    tuned = {(name, rate): arms[name].but(learning_rate=rate, seed=TUNING_SEED) for name, rate in todo}
    _side_by_side(
        study,
        {folder / "rates" / f"{n}-{rate:g}": recipe for (n, rate), recipe in tuned.items()},
        watch,
        None,
    )
    with watch.training(len(todo), 0):
        for i, (name, rate) in enumerate(todo):
            began = time.perf_counter()
            value = found.setdefault(name, {})[f"{rate:g}"] = _reached(
                study, tuned[name, rate], folder / "rates" / f"{name}-{rate:g}"
            )
            store.write_json(kept, found)
            said = (
                f"{name}, learning rate {rate:g}:"
                f" {'diverged' if value is None else _told(study.metric, value)}"
            )
            watch.step({"step": i + 1, "seconds": time.perf_counter() - began, "said": said})
    notes = [
        f"each arm at its best of {len(rates)} learning rates, picked by the same held-out rows with a seed"
        " that does not count"
    ]
    best: dict[str, float] = {}
    for name in arms:
        ended = {rate: value for rate in rates if (value := found[name][f"{rate:g}"]) is not None}
        if not ended:
            raise RecipeError(
                f"arm {name}: it diverged at every learning rate of {', '.join(f'{r:g}' for r in rates)};"
                " give smaller ones"
            )
        best[name] = (max if says(study.metric).up else min)(ended, key=ended.__getitem__)
        edge = {rates[0]: "smallest", rates[-1]: "largest"}.get(best[name])
        notes.append(
            f"{name}: learning rate {best[name]:g}"
            + f", the {edge} of them: a better one may lie beyond" * bool(edge)
        )
    return {name: r.but(learning_rate=best[name]) for name, r in arms.items()}, notes


def _reached(study: Study, recipe: Recipe, where: Path) -> float | None:
    """The metric that a run ends with; None where it diverged."""
    try:
        if not (where / "report.json").is_file():
            _run(study, recipe, where, None, None)
    except RecipeError as error:
        if "is not finite" in str(error):
            return None
        raise
    after = _report(where)["after"]
    if study.metric not in after:
        raise RecipeError(
            f"--metric: the arms measured no '{study.metric}'{did_you_mean(study.metric, after)}"
        )
    return float(after[study.metric])


# ---------------------------------------------------------------------------------------------- running


@dataclass
class Found:
    """What is known of an arm."""

    recipe: Recipe
    runs: dict[int, Path] = field(default_factory=dict)  # seed -> folder
    stopped: str = ""  # why it was stopped early, if so


def compare(
    arms: Mapping[str, Any],
    *,
    seeds: int = 3,
    budget: str | None = None,
    metric: str = "loss",
    stop_early: bool = True,
    learning_rates: Sequence[float] = (),
    together: bool = False,
    folder: str | Path | None = None,
    watch: Any = None,
    **shared: Any,
) -> dict[str, Any]:
    """Compare recipes: name -> a recipe's file, mapping or Recipe; shared: keys of all of them.

    >>> luthier.compare({"lora": {"tuner": "lora"}, "full": {"tuner": "full"}}, data="rows.jsonl", budget="100
    steps")
    """
    made = {str(name): Recipe.load(arm, shared) for name, arm in arms.items()}
    study = Study(
        made, seeds, budget, metric, stop_early, learning_rates=tuple(learning_rates), together=together
    )
    return conduct(study, Path(folder) if folder else None, watch)


def conduct(study: Study, folder: Path | None = None, watch: Any = None) -> dict[str, Any]:
    """Run every arm with every seed and say what came of it. Also written to FOLDER/comparison.json and
    report.html.
    """
    from luthier.report.comparison import page
    from luthier.report.console import Callback

    watch = watch or Callback()
    arms, notes = fair(study)
    folder = Path(folder or Path("runs") / f"compare-{study.fingerprint()}")
    with _taken(folder, study):
        arms, picked = swept(study, budgeted(study, arms, folder, watch), folder, watch)
        notes += picked
        for sentence in notes:
            watch.warn(sentence)
        found = {name: Found(recipe) for name, recipe in arms.items()}
        early = study.stop_early and len(arms) > 2 and not any(r.plan for r in arms.values())
        for share in RUNGS if early else ():
            _all(study, found, folder, watch, share)
            for name, why in _hopeless(study, found, share).items():
                found[name].stopped = why
                watch.warn(f"{name} is stopped: {why}")
        _all(study, found, folder, watch, None)
        result = {**judge(study, found), "notes": notes, "date": str(date.today()), "folder": str(folder)}
        store.write_json(folder / "comparison.json", result)
        store.write_text(folder / "report.html", page(result))
    return result


@contextmanager
def _taken(folder: Path, study: Study) -> Iterator[None]:
    """The folder for oneself: another command in it is refused, and so is another comparison."""
    with store.alone_in(folder):
        state = folder / "study.json"
        known = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else None
        if known and known["fingerprint"] != study.fingerprint():
            raise RecipeError(f"{folder} holds another comparison; give another --to")
        if known is None:
            arms = {k: r.yaml() for k, r in study.arms.items()}
            store.write_json(state, {"fingerprint": study.fingerprint(), "arms": arms, "seeds": study.seeds})
        yield


def _all(study: Study, found: dict[str, Found], folder: Path, watch: Any, until: float | None) -> None:
    """Every arm that is not stopped, with every seed, up to a share of its steps."""
    live = {n: f for n, f in found.items() if not f.stopped}
    todo = [(seed, name) for seed in study.drawn or range(study.seeds) for name in live]
    done = _side_by_side(
        study,
        {folder / f"{name}-{seed}": live[name].recipe.but(seed=seed) for seed, name in todo},
        watch,
        until,
    )
    with watch.training(len(todo), 0):
        for i, (seed, name) in enumerate(todo):
            where = folder / f"{name}-{seed}"
            live[name].runs[seed] = where
            began = time.perf_counter()
            if where not in done and not (where / "report.json").is_file():
                try:
                    _run(study, live[name].recipe.but(seed=seed), where, until, None)
                except RecipeError as error:
                    if "is not finite" not in str(error):
                        raise RecipeError(f"arm {name}, seed {seed}: {error}") from None
                    live[name].stopped = f"it diverged with seed {seed}: {error}"
                    watch.warn(f"{name} is stopped: {live[name].stopped}")
            far = "" if until is None else f", {100 * until:.0f}% of the steps"
            said = f"{name}, seed {seed}{far}: {'diverged' if live[name].stopped else _came(study, where)}"
            watch.step({"step": i + 1, "seconds": time.perf_counter() - began, "said": said})


def _told(metric: str, value: Any) -> str:
    """A number as a line of progress has it."""
    return f"{says(metric).label} {number(value, says(metric).share)}"


def _came(study: Study, where: Path) -> str:
    """What a run measured last, finished or paused."""
    done = where / "report.json"
    said = json.loads((done if done.is_file() else where / "paused.json").read_text(encoding="utf-8"))
    known = {**said["stats"], **said["after" if done.is_file() else "metrics"]}
    return (
        _told(study.metric, known[study.metric])
        if isinstance(known.get(study.metric), (int, float))
        else "done"
    )


def _side_by_side(study: Study, runs: Mapping[Path, Recipe], watch: Any, until: float | None) -> set[Path]:
    """The folders of those that could share a base, and did. Where one of them fails all are run alone, so
    that it is known which.
    """
    from luthier.run import subprocess as apart
    from luthier.train import batched_lora as fleet

    crews: dict[str, list[Path]] = {}
    for where, recipe in runs.items() if study.together and study.metric not in COSTS else ():
        if (key := fleet.alike(recipe)) and not (where / "report.json").is_file():
            crews.setdefault(key, []).append(where)
    done: set[Path] = set()
    for every in crews.values():
        for crew in (every[i : i + CREW] for i in range(0, len(every), CREW)):
            if len(crew) < 2:
                continue
            watch.stage(
                f"{_and([where.name for where in crew])}, side by side on one base: peak memory is not theirs"
                " alone"
            )
            try:
                (apart.side_by_side if study.apart else fleet.perform)(
                    [(runs[where], where) for where in crew], until=until
                )
                done |= {*crew}
            except RecipeError as error:
                watch.warn(f"side by side: {error}; each is run alone")
    return done


def _run(
    study: Study, recipe: Recipe, where: Path, until: float | None, step: Callable[[int], None] | None
) -> None:
    if study.apart:
        from luthier.run import subprocess as apart

        apart.tune({k: v for k, v in recipe.public().items() if k != "output_dir"}, where, until, step)
        return
    from luthier.run.run import perform

    perform(recipe, where, until=until)


def _hopeless(study: Study, found: dict[str, Found], share: float) -> dict[str, str]:
    """Arms outside the better half that are behind the best by more than chance explains, and why."""
    live = {n: _by_row(f, "during", study.metric) for n, f in found.items() if not f.stopped}
    live = {n: x for n, x in live.items() if x is not None}
    if len(live) < 3:
        return {}
    sign = -1 if says(study.metric).up else 1
    order = sorted(live, key=lambda n: sign * float(live[n].mean()))
    others = [n for n in order[1:]]
    apart = {n: difference(sign * live[n], sign * live[order[0]]) for n in others}
    sure = dict(zip(others, holm([apart[n].p for n in others])))
    behind = [n for n in order[-(len(order) // 2) :] if apart.get(n) and sure[n] < WRONG and apart[n].low > 0]
    return {
        n: (
            f"after {share:.0%} of its steps its {study.metric} is {number(float(live[n].mean()))}, that of"
            f" {order[0]} {number(float(live[order[0]].mean()))} (apart by {number(apart[n].low)} to"
            f" {number(apart[n].high)})"
        )
        for n in behind
    }


# ---------------------------------------------------------------------------------------------- judging


def judge(study: Study, found: Mapping[str, Found]) -> dict[str, Any]:
    """Every metric of every arm with its interval, every pair of arms with its difference, the front, and a
    sentence.
    """
    ended = {n: f for n, f in found.items() if not f.stopped}
    reports = {n: [_report(f.runs[s]) for s in sorted(f.runs)] for n, f in ended.items()}
    metrics = [
        k
        for k in dict.fromkeys(k for rs in reports.values() for r in rs for k in r["after"])
        if all(k in r["after"] for rs in reports.values() for r in rs)
    ]
    table: dict[str, dict[str, Any]] = {}
    pairs: dict[str, list[dict[str, Any]]] = {}
    for metric in [*metrics, *COSTS]:
        values = {n: v for n in ended if (v := _values(ended[n], reports[n], metric)) is not None}
        if len(values) < len(ended):
            continue
        table[metric] = {n: _cell(v) for n, v in values.items()}
        if metric not in COSTS and "/" not in metric:
            pairs[metric] = _pairs(values)
    if ended and study.metric not in table:
        raise RecipeError(
            f"--metric: the arms measured no '{study.metric}'{did_you_mean(study.metric, table)}"
        )
    points = {
        n: [
            (-1 if _up(g) else 1) * table[g][n]["mean"]
            for g in dict.fromkeys((study.metric, *GOALS))
            if g in table
        ]
        for n in ended
    }
    first = next(iter(found.values())).recipe
    return {
        "sentence": sentence(
            study.metric,
            table.get(study.metric, {}),
            pairs.get(study.metric, []),
            {n: f.stopped for n, f in found.items() if f.stopped},
        ),
        "metric": study.metric,
        "table": table,
        "pairs": pairs,
        "front": front(points),
        "goals": [g for g in dict.fromkeys((study.metric, *GOALS)) if g in table],
        "stopped": {n: f.stopped for n, f in found.items() if f.stopped},
        "before": {
            k: float(np.mean([r["before"][k] for rs in reports.values() for r in rs if k in r["before"]]))
            for k in metrics
            if any(k in r["before"] for rs in reports.values() for r in rs)
        },
        "arms": {
            n: {
                "recipe": f.recipe.yaml(),
                "runs": [str(f.runs[s]) for s in sorted(f.runs)],
                "learning_rate": f.recipe.learning_rate,
            }
            for n, f in found.items()
        },
        "seeds": study.seeds,
        "budget": study.budget,
        "rows": next((r["stats"].get("held_out_rows") for rs in reports.values() for r in rs), None),
        "model": first.model,
        "data": first.data if isinstance(first.data, (str, dict)) else "rows given in Python",
    }


def _report(where: Path) -> dict[str, Any]:
    """What a run ended with; of a plan, before its first run, after its last, and what all of them cost."""
    said = json.loads((where / "report.json").read_text(encoding="utf-8"))
    acts = [_report(act) for act in _acts(said)]
    if not acts:
        return said
    seconds = [act["stats"].get("seconds", 0.0) for act in acts]
    read = sum(act["stats"].get("tokens_per_second", 0.0) * s for act, s in zip(acts, seconds))
    cost = {"seconds": sum(seconds), "tokens_per_second": read / max(sum(seconds), 1e-9)}
    peak = max(act["stats"].get("peak_memory_mb", 0.0) for act in acts)
    return {**said, "before": acts[0]["before"], "stats": {**said["stats"], **cost, "peak_memory_mb": peak}}


def _acts(report: Mapping[str, Any]) -> list[Path]:
    return [Path(act) for act in report.get("acts") or ()]


def _files(where: Path) -> Path:
    """The folder that a run's files lie in; of a plan, that of the run that stands for it."""
    path = where / "report.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return Path(said["folder"]) if _acts(said) else where


def _up(metric: str) -> bool | None:
    return COSTS[metric][1] if metric in COSTS else says(metric).up


def _values(found: Found, reports: Sequence[dict], metric: str) -> np.ndarray | None:
    """[seeds, rows] of a metric; [seeds, 1] where it is no mean over rows."""
    by_row = _by_row(found, "after", metric)
    if by_row is not None:
        return by_row
    said = [{**r["stats"], "trained": r["stats"].get("moving"), **r["after"]}.get(metric) for r in reports]
    return np.array(said, float)[:, None] if all(isinstance(x, (int, float)) for x in said) else None


def _by_row(found: Found, when: str, metric: str) -> np.ndarray | None:
    seeds = []
    for seed in sorted(found.runs):
        path = _files(found.runs[seed]) / f"by-row-{when}.json"
        said = json.loads(path.read_text(encoding="utf-8")).get(metric) if path.is_file() else None
        if said is None and when == "during":  # finished before it could be paused: its end says more
            return _by_row(found, "after", metric)
        if not said:
            return None
        seeds.append(said)
    if not seeds or any(s.keys() != seeds[0].keys() for s in seeds):
        return None
    return np.array([[s[row] for row in sorted(seeds[0])] for s in seeds])


def _cell(values: np.ndarray) -> dict[str, Any]:
    low, high = interval(values) if values.size > 1 else (float(values.mean()),) * 2
    return {
        "mean": float(values.mean()),
        "low": low,
        "high": high,
        "by_seed": [float(x) for x in values.mean(1)],
        "rows": values.shape[1],
    }


def _pairs(values: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Every pair of arms; p values are Holm's, over all pairs of this metric."""
    found = [
        (a, b, difference(values[a], values[b]))
        for a, b in combinations(values, 2)
        if values[a].shape == values[b].shape
    ]
    sure = holm([d.p for _, _, d in found])
    return [
        {
            "a": a,
            "b": b,
            "difference": d.mean,
            "low": d.low,
            "high": d.high,
            "p": p,
            "apart": bool(p < WRONG and d.seen),
        }
        for (a, b, d), p in zip(found, sure)
    ]


def sentence(
    metric: str, cells: Mapping[str, Mapping], pairs: Sequence[Mapping], stopped: Mapping[str, str]
) -> str:
    """The answer: who is best, and from whom no difference was seen. Says no more than the intervals do."""
    if not cells:
        return "No arm came to its end."
    how, best = says(metric), (max if says(metric).up else min)(cells, key=lambda n: cells[n]["mean"])
    said = f"{how.label}: {best} {number(cells[best]['mean'], how.share)}"
    apart = {p["b"] if p["a"] == best else p["a"]: p for p in pairs if best in (p["a"], p["b"])}
    behind = [n for n, p in apart.items() if p["apart"]]
    level = [n for n in cells if n != best and n not in behind]
    if behind:
        said += f", better than {_and(behind)}"
    if level:
        said += (
            f"; no difference seen between it and {_and(level)}"
            if behind
            else f"; no difference seen between it and {_and(level)}, so no winner"
        )
    if stopped:
        said += f"; stopped early: {_and(list(stopped))}"
    return said[0].upper() + said[1:] + "."


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
