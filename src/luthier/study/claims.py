"""Claims: what a paper says of a method, tried on the practice models over several seeds, with its interval.

A claim is a file, benchmarks/claims/NAME.yaml. Its arms are recipes; where an arm lists learning rates, a
seed that no test uses picks one of them for that arm. Then every arm runs with every test seed: the same rows
in the same order for all arms, other rows and another order for the next seed. What is judged is the
difference of two arms, paired by seed, by Student's t interval of its mean at 95 %; with three seeds a
percentile bootstrap is too narrow to judge by, so it is told beside it.

Results lie in benchmarks/claims/results/NAME.json, and docs/claims.md is written from them. Nothing here
imports a network before something is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.errors import NotFinite, RecipeError
from luthier.registry import did_you_mean, format_errors
from luthier.run import subprocess as apart
from luthier.storage.toy import is_toy

HELD, NOT_HELD, UNDECIDED, UNTESTABLE = "held", "not held", "undecided", "not testable here"
BEFORE = "before"  # the arm that is the start of the other arm's runs
TUNING_SEED = 1000  # of the runs that pick a learning rate; test seeds are 0, 1, 2, ...
MOST_SEEDS = 20
T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
)
"""The 97.5 % point of Student's t, by degrees of freedom from 1."""
QUIET = {"save_steps": 100_000, "evaluate": ["loss", "accuracy"]}  # of every arm, unless it says otherwise
NUMBER = r"\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
EXPECTED = re.compile(rf"(\w+) (?:([<>]) (\w+) by|= (\w+) within) (-?{NUMBER})(?: in (\S+))?")
SELECTED = re.compile(r"(lowest|highest) (\S+)")


# ---------------------------------------------------------------------------------------------- a claim


@dataclass(frozen=True)
class Expectation:
    """One sentence of `expect`, understood."""

    said: str
    left: str
    sign: str  # > < =
    right: str
    # the least difference that counts (below 0: how much worse is still no worse); of "=", the largest that
    # does not
    effect: float
    metric: str

    def verdict(self, low: float, high: float) -> str:
        """low, high: interval of left - right."""
        if self.sign == "=":
            if -self.effect <= low and high <= self.effect:
                return HELD
            return NOT_HELD if low > self.effect or high < -self.effect else UNDECIDED
        low, high = (low, high) if self.sign == ">" else (-high, -low)
        return HELD if low >= self.effect else NOT_HELD if high < self.effect else UNDECIDED


class Claim(BaseModel):
    """A claim's file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(exclude=True)  # of the file
    claim: str  # what the paper says, in a sentence
    paper: str | None = None  # arXiv:...
    row: str = ""  # the paper's short name in the catalogue, if it has one
    shared: dict[str, Any] = {}  # recipe keys of all arms
    # name -> recipe keys; a list under what is swept is this arm's sweep
    arms: dict[str, dict[str, Any]] = {}
    # what arms sweep: a key of recipes, or a setting of a method, such as tuner.lora_dropout
    sweep: str = "learning_rate"
    # what is compared: a name in a report's metrics, stats.NAME, or log.NAME of metrics.jsonl
    metric: str = ""
    select: str = "lowest loss"  # by what a sweep picks: lowest or highest METRIC
    # A > B by X, A < B by X, A = B within X; `in METRIC` where it is another than `metric`
    expect: list[str] = []
    seeds: Annotated[int, Field(ge=2, le=MOST_SEEDS)] = 3
    budget: str = ""  # what is equal between the arms, in words
    fresh: bool = False  # each run in a process of its own, which is what makes its peak of memory its own
    untestable: str = ""  # why it cannot be tried here, if so

    @property
    def expectations(self) -> list[Expectation]:
        return [self._expectation(said) for said in self.expect]

    def _expectation(self, said: str) -> Expectation:
        found = EXPECTED.fullmatch(" ".join(said.split()))
        if not found:
            raise self.wrong(
                f"expect: '{said}' is not `A > B by 0.02`, `A < B by 0.02` or `A = B within 0.02` (and `in"
                " METRIC`)"
            )
        left, sign, right, alike, effect, metric = found.groups()
        for arm in (left, right or alike):
            if arm not in (*self.arms, BEFORE):
                raise self.wrong(f"expect: there is no arm '{arm}'{did_you_mean(arm, [*self.arms, BEFORE])}")
        if alike and float(effect) < 0:
            raise self.wrong(f"expect: '{said}': nothing lies within less than 0")
        if left == (right or alike):
            raise self.wrong(f"expect: '{said}' compares an arm with itself")
        if not (metric or self.metric):
            raise self.wrong(f"expect: '{said}' names no metric, and neither does the file")
        return Expectation(said, left, sign or "=", right or alike, float(effect), metric or self.metric)

    def rates(self, arm: str) -> list[float]:
        """The learning rates, or whatever is swept, of which an arm takes its best; none where it says one or
        none.
        """
        key, _, setting = self.sweep.partition(".")
        said = {**self.shared, **self.arms[arm]}.get(key)
        if setting:
            said = said.get(setting) if isinstance(said, dict) else None
        return [float(rate) for rate in said] if isinstance(said, list) else []

    def recipe(self, arm: str, seed: int, rate: float | None = None) -> dict[str, Any]:
        """The keys of one run. Rows of practice worlds are drawn by the run's seed."""
        keys = {**QUIET, **self.shared, **self.arms[arm], "seed": seed}
        if rate is not None:
            key, _, setting = self.sweep.partition(".")
            keys[key] = {**keys[key], setting: rate} if setting else rate
        for key in ("data", "eval_data"):
            if key in keys:
                keys[key] = _drawn(keys[key], seed)
        return keys

    def runs(self, seeds: int) -> tuple[list[tuple[str, int, float]], list[tuple[str, int]]]:
        """The runs that pick learning rates, and those that count: the arms of a seed one after the other."""
        sweep = [
            (arm, TUNING_SEED, rate)
            for arm in self.arms
            for rate in self.rates(arm)
            if len(self.rates(arm)) > 1
        ]
        return sweep, [(arm, seed) for seed in range(seeds) for arm in self.arms]

    def mark(self) -> str:
        """What a result is a result of: all but the words around it and the number of seeds."""
        said = self.model_dump(include={"shared", "arms", "metric", "select", "expect", "fresh"})
        said |= {} if self.sweep == "learning_rate" else {"sweep": self.sweep}
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def wrong(self, why: str) -> RecipeError:
        return RecipeError(f"claim {self.name}: {why}")


def _words(key: str) -> str:
    return key.rpartition(".")[2].replace("_", " ")


def _drawn(rows: Any, seed: int) -> Any:
    """`data` whose toy tasks are drawn by a seed, where the file does not say another."""
    if isinstance(rows, list):
        return [_drawn(each, seed) for each in rows]
    named = {"path": rows} if isinstance(rows, str) else rows
    generated = isinstance(named, Mapping) and is_toy(named.get("path"))
    return {"seed": seed, **named} if generated else rows


def home() -> Path:
    """Where the claims lie: below the folder one stands in, else in the clone that this package is run from."""
    here = Path("benchmarks/claims")
    return here if here.is_dir() else Path(__file__).resolve().parents[3] / here


def names(folder: Path | None = None) -> list[str]:
    return sorted(path.stem for path in (folder or home()).glob("*.yaml"))


def every() -> list[str]:
    """The names of all claims; a sentence where there are none."""
    found = names()
    if not found:
        raise RecipeError(
            f"there are no claims in {home()}: they come with a clone of luthier; run this inside one"
        )
    return found


def read(name: str, folder: Path | None = None) -> Claim:
    """A claim by name. Raises RecipeError, a sentence, for what cannot be understood."""
    folder = folder or home()
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(
            f"there is no claim '{name}'{did_you_mean(name, names(folder))}"
            + ("" if names(folder) else f": {folder} holds none")
        )
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise RecipeError(
            f"claim {name}{f', line {mark.line + 1}' if mark else ''}: this is not YAML"
        ) from None
    if not isinstance(given, dict):
        raise RecipeError(f"claim {name}: a claim is `key: value` lines, not {type(given).__name__}")
    allowed = [key for key in Claim.model_fields if key != "name"]
    for key in given:
        if key not in allowed:
            raise RecipeError(f"claim {name}: a claim has no '{key}'{did_you_mean(key, allowed)}")
    if isinstance(given.get("expect"), str):
        given["expect"] = [given["expect"]]
    try:
        claim = Claim(name=name, **given)
    except ValidationError as error:
        raise RecipeError(f"claim {name}: {format_errors(error)}") from None
    check(claim)
    return claim


def check(claim: Claim) -> None:
    """Refuse what no run could make sense of; the methods that arms name are checked when it is run."""
    from luthier.recipe.catalogue import known
    from luthier.recipe.recipe import Recipe

    rows = [paper["name"] for paper in known()]
    for row in claim.row.split():
        if row not in rows:
            raise claim.wrong(f"row: the catalogue has no '{row}'{did_you_mean(row, rows)}")
    if claim.untestable:
        return
    if not claim.arms or not claim.expect:
        raise claim.wrong("it needs `arms` and `expect`, or `untestable` with the reason")
    if BEFORE in claim.arms:
        raise claim.wrong(f"no arm may be called '{BEFORE}': that is the start of the other arm's runs")
    if not SELECTED.fullmatch(claim.select):
        raise claim.wrong(f"select: '{claim.select}' is not `lowest METRIC` or `highest METRIC`")
    assert claim.expectations is not None  # understood
    for arm in claim.arms:
        if not re.fullmatch(r"\w+", arm):
            raise claim.wrong(f"an arm's name is letters, digits and underscores, not '{arm}'")
        try:
            rates = claim.rates(arm)
        except (TypeError, ValueError):
            raise claim.wrong(
                f"arm {arm}: the list under {claim.sweep} holds something that is no number"
            ) from None
        try:
            Recipe.load(claim.recipe(arm, 0, rates[0] if rates else None))
        except RecipeError as error:
            raise claim.wrong(f"arm {arm}: {error}") from None


def rows(folder: Path | None = None) -> dict[str, list[str]]:
    """Short name of a paper -> 'claim/name' of the claims that try it; read from the files alone."""
    found: dict[str, list[str]] = {}
    for path in sorted((folder or home()).glob("*.yaml")):
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
        for row in str(said.get("row") or "").split() if isinstance(said, dict) else ():
            found.setdefault(row, []).append(f"claim/{path.stem}")
    return found


# ---------------------------------------------------------------------------------------------- numbers


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Student's t interval of the mean at 95 %."""
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    half = T[len(differences) - 2] * spread / len(differences) ** 0.5
    return mean - half, mean + half


def bootstrap(differences: Sequence[float], times: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap of the mean at 95 %, over seeds: too narrow where they are few."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(differences, k=len(differences))) for _ in range(times))
    return means[round(0.025 * times)], means[round(0.975 * times) - 1]


def together(verdicts: Sequence[str]) -> str:
    """Of several expectations: all must hold, and one that does not is enough."""
    return HELD if set(verdicts) == {HELD} else NOT_HELD if NOT_HELD in verdicts else UNDECIDED


@dataclass
class Numbers:
    """What came of one run."""

    before: dict[str, float]
    after: dict[str, float]
    stats: dict[str, Any] = field(default_factory=dict)
    took: float = 0.0  # seconds, loading and measuring included

    log: list[dict[str, Any]] = field(default_factory=list)  # what training logged, step by step

    def get(self, claim: Claim, arm: str, metric: str, before: bool = False) -> float:
        value = self.known(before).get(metric)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            has = [k for k, v in self.known(before).items() if isinstance(v, (int, float))]
            raise claim.wrong(f"arm {arm} measured no '{metric}'{did_you_mean(metric, has)}")
        return float(value)

    def known(self, before: bool = False) -> dict[str, Any]:
        """Every number by its name: metrics, stats.NAME, log.NAME (the first step's, or the mean of the last
        quarter).
        """
        lines = self.log[:1] if before else self.log[-max(1, len(self.log) // 4) :]
        logged = [
            k
            for k in (lines[-1] if lines else ())
            if all(isinstance(line.get(k), (int, float)) for line in lines)
        ]
        steps = {f"log.{k}": statistics.fmean(line[k] for line in lines) for k in logged}
        return {
            **(self.before if before else self.after),
            **{f"stats.{k}": v for k, v in self.stats.items()},
            **steps,
        }


def judge(claim: Claim, found: Mapping[tuple[str, int], Numbers]) -> list[dict[str, Any]]:
    """Each expectation against the numbers of every arm and seed."""
    seeds = sorted({seed for _, seed in found})
    out = []
    for e in claim.expectations:
        other = {BEFORE: e.left if e.right == BEFORE else e.right}

        def measured(arm: str, seed: int, metric: str = e.metric, other: dict = other) -> float:
            return found[other.get(arm, arm), seed].get(
                claim, other.get(arm, arm), metric, before=arm == BEFORE
            )

        left, right = ([measured(arm, seed) for seed in seeds] for arm in (e.left, e.right))
        apart = [a - b for a, b in zip(left, right)]
        low, high = interval(apart)
        blind = e.sign != "=" and len({*left, *right}) == 1  # all at the floor or the ceiling of the metric
        out.append(
            {
                "expect": e.said,
                "metric": e.metric,
                "verdict": UNDECIDED if blind else e.verdict(low, high),
                e.left: rounded(left),
                e.right: rounded(right),
                "difference": rounded(statistics.fmean(apart)),
                "interval": rounded([low, high]),
                "bootstrap": rounded(bootstrap(apart)),
            }
        )
    return out


def rounded(value: Any) -> Any:
    """Five significant digits: enough to check an interval by."""
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# ---------------------------------------------------------------------------------------------- running


def run(
    name: str,
    seeds: int | None = None,
    folder: Path | None = None,
    runs: Path = Path("runs/claims"),
    tell: Callable = print,
) -> dict:
    """Try a claim and write its result. What an earlier call finished answers at once. tell: hears a line a
    run.
    """
    claim = read(name, folder)
    folder, count = folder or home(), seeds if seeds is not None else claim.seeds
    if not 2 <= count <= MOST_SEEDS:
        raise RecipeError(f"seeds: an interval wants 2 to {MOST_SEEDS}, not {count}")
    about = {"claim": claim.claim, "paper": claim.paper, "mark": claim.mark()}
    if claim.untestable:
        tell(f"{name}: {UNTESTABLE}: {claim.untestable}")
        return _write(
            folder, name, {**about, "verdict": UNTESTABLE, "why": claim.untestable, "date": str(date.today())}
        )
    sweep, tests = claim.runs(count)
    progress = Progress(name, len(sweep) + len(tests), tell)
    chosen: dict[str, float | None] = {
        arm: rates[0] if (rates := claim.rates(arm)) else None for arm in claim.arms
    }
    swept: dict[str, dict[str, float | None]] = {}
    tried: list[Numbers | None] = []
    how, by = SELECTED.fullmatch(claim.select).groups()  # pyright: ignore[reportOptionalMemberAccess]
    for arm, seed, rate in sweep:
        numbers = _perform(claim, arm, seed, rate, runs, progress, may_diverge=True)
        tried.append(numbers)
        swept.setdefault(arm, {})[f"{rate:g}"] = (
            None if numbers is None else rounded(numbers.get(claim, arm, by))
        )
    for arm, measured in swept.items():
        left = {rate: value for rate, value in measured.items() if value is not None and value == value}
        if not left:
            raise claim.wrong(f"arm {arm}: it diverged at every {_words(claim.sweep)} of its sweep")
        chosen[arm] = float((min if how == "lowest" else max)(left, key=left.__getitem__))
    found = {(arm, seed): _perform(claim, arm, seed, chosen[arm], runs, progress) for arm, seed in tests}
    judged = judge(claim, {key: numbers for key, numbers in found.items() if numbers is not None})
    verdict = together([e["verdict"] for e in judged])
    metrics = {e.metric for e in claim.expectations}
    numbers = {
        arm: {
            str(seed): {k: rounded(v) for k, v in _kept(n, metrics).items()}
            for (a, seed), n in found.items()
            if a == arm and n
        }
        for arm in claim.arms
    }
    tell(f"{name}: {verdict}")
    return _write(
        folder,
        name,
        {
            **about,
            "verdict": verdict,
            "expectations": judged,
            "seeds": list(range(count)),
            "tuning_seed": TUNING_SEED if sweep else None,
            "learning_rates": {arm: rate for arm, rate in chosen.items() if rate is not None},
            "sweeps": swept,
            "select": claim.select,
            "at_edge": [a for a, v in swept.items() if chosen[a] in (min(map(float, v)), max(map(float, v)))],
            "numbers": numbers,
            "machine": {**machine(), **_kinds(found.values())},
            "date": str(date.today()),
            "seconds": round(sum(n.took for n in (*tried, *found.values()) if n)),
        },
    )


def _kinds(found: Iterable[Numbers | None]) -> dict[str, str]:
    """On what, and in which precision, the runs computed."""
    return {
        k: ", ".join(sorted({str(n.stats[k]) for n in found if n and k in n.stats}))
        for k in ("device", "dtype")
    }


def _kept(numbers: Numbers, metrics: set[str]) -> dict[str, float]:
    """What the result keeps of a run: all that was measured, what it cost, and what was judged."""
    cost = ("stats.seconds", "stats.peak_memory_mb", "stats.moving", "stats.steps", "stats.data_rows")
    end, start = numbers.known(), numbers.known(before=True)
    kept = {
        k: v
        for k, v in end.items()
        if k in metrics or k in cost or not ("/" in k or k.startswith(("stats.", "log.")))
    }
    return kept | {f"{BEFORE}.{k}": start[k] for k in kept if k in start and k not in cost}


@dataclass
class Progress:
    """A line a run, with the time that is left at the pace so far."""

    name: str
    total: int
    tell: Callable
    done: int = 0
    new: list[float] = field(default_factory=list)  # seconds of runs that were not finished before

    def step(self, what: str, seconds: float, fresh: bool) -> None:
        self.done += 1
        self.new += [seconds] if fresh else []
        left = (self.total - self.done) * statistics.fmean(self.new) if self.new else 0
        took = f"{seconds:.0f} s" if fresh else "was finished"
        self.tell(
            f"[{self.done}/{self.total}] {self.name}: {what}: {took}"
            + (f"; about {left:.0f} s left" if left else "")
        )


def _perform(
    claim: Claim,
    arm: str,
    seed: int,
    rate: float | None,
    runs: Path,
    progress: Progress,
    may_diverge: bool = False,
):
    """One run in its folder; None where it diverged and may."""
    keys = claim.recipe(arm, seed, rate)
    mark = hashlib.sha256(json.dumps([keys, claim.fresh], sort_keys=True, default=str).encode()).hexdigest()[
        :8
    ]
    where = runs / claim.name / f"{arm}-{seed}-{mark}"
    what = f"{arm}, seed {seed}" + (f", {_words(claim.sweep)} {rate:g}" if rate is not None else "")
    began, finished = time.perf_counter(), (where / "report.json").is_file()
    if not finished:
        try:
            (apart.tune if claim.fresh else _here)(keys, where)
        except RecipeError as error:
            if not (may_diverge and isinstance(error, NotFinite)):
                raise claim.wrong(f"arm {arm}, seed {seed}: {error}") from None
            progress.step(f"{what}, diverged", time.perf_counter() - began, True)
            return None
        _lighten(where)
        (where / "took.json").write_text(json.dumps(time.perf_counter() - began), encoding="utf-8")
    said = json.loads((where / "report.json").read_text(encoding="utf-8"))
    took = (
        json.loads((where / "took.json").read_text(encoding="utf-8"))
        if (where / "took.json").is_file()
        else 0.0
    )
    progress.step(what, time.perf_counter() - began, not finished)
    logged = Path(said["folder"]) / "metrics.jsonl"
    lines = (
        [json.loads(line) for line in logged.read_text(encoding="utf-8").splitlines()]
        if logged.is_file()
        else []
    )
    return Numbers(said["before"], said["after"], said["stats"], took, lines)


def _here(keys: dict[str, Any], where: Path) -> None:
    from luthier.recipe.recipe import Recipe
    from luthier.run.run import perform

    perform(Recipe.load(keys), where)


def _lighten(where: Path) -> None:
    """Of a finished run the numbers stay, and how it was made: its weights are in nobody's way."""
    for path in [*where.rglob("checkpoint-*")]:
        shutil.rmtree(path)
    for path in where.rglob("*.safetensors"):
        path.unlink()


def machine() -> dict[str, Any]:
    """Where numbers were measured; they are other numbers elsewhere."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    models = (
        re.findall(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.M)
        if info.is_file()
        else []
    )
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": cores,
        "threads": os.environ.get("OMP_NUM_THREADS", "as torch chooses"),
        "system": platform.system(),
        "versions": {
            "python": platform.python_version(),
            **{p: _version(p) for p in ("luthier", "torch", "transformers", "peft")},
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _write(folder: Path, name: str, result: dict[str, Any]) -> dict[str, Any]:
    path = folder / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.part")
    beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
    return result


# ---------------------------------------------------------------------------------------------- telling


def result(name: str, folder: Path | None = None) -> dict[str, Any] | None:
    """What was measured; None where nothing was."""
    path = (folder or home()) / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def status(claim: Claim, folder: Path | None = None) -> str:
    """The verdict, or why there is none."""
    if claim.untestable:
        return UNTESTABLE
    found = result(claim.name, folder)
    if found is None:
        return "not run yet"
    return found["verdict"] if found["mark"] == claim.mark() else "not run since it was changed"


def listing(folder: Path | None = None) -> list[dict[str, Any]]:
    """Every claim with its verdict."""
    return [
        {"name": n, "verdict": status(c, folder), "paper": c.paper, "claim": c.claim}
        for n in names(folder)
        for c in [read(n, folder)]
    ]


def page(folder: Path | None = None) -> str:
    """docs/claims.md."""
    every = [read(name, folder) for name in names(folder)]
    lines = [
        "# Claims",
        "",
        (
            "What papers say of methods, tried on the practice models. Written from `benchmarks/claims`;"
            " `luthier claims NAME` tries one"
        ),
        (
            "again. A verdict is about these small models, these worlds and these few steps, not about the"
            " paper: it says what a user may"
        ),
        (
            "expect to see here. *held*: the whole interval lies beyond the least effect in the claimed"
            " direction. *not held*: the whole"
        ),
        (
            "interval falls short of it. *undecided*: neither, or all runs alike. The interval is Student's t"
            " at 95 % of the mean difference, paired by seed:"
        ),
        (
            "each seed draws other rows to learn and to be measured on, the same for all arms. Several"
            " intervals are not corrected for"
        ),
        (
            "being several. Where learning rates (or another setting) were swept, a seed that no test uses"
            " picked one for each arm."
        ),
        "",
        "| claim | verdict | expected | difference (95 %) | seeds | paper |",
        "| - | - | - | - | - | - |",
    ]
    for c in every:
        lines += _table(c, status(c, folder), result(c.name, folder))
    for c in every:
        lines += ["", f"## {c.name}", "", *_paragraph(c, status(c, folder), result(c.name, folder))]
    return "\n".join(lines)


def _table(claim: Claim, verdict: str, found: dict | None) -> Iterator[str]:
    paper = claim.paper or ""
    linked = (
        f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
        if paper.startswith("arXiv:")
        else paper
    )
    first = f"[{claim.name}](#{claim.name}) | **{verdict}**"
    if not found or "expectations" not in found or verdict != found["verdict"]:
        yield (
            f"| {first} | {'; '.join(map(_shown, claim.expectations)) if claim.arms else ''} | | | {linked} |"
        )
        return
    for i, (e, m) in enumerate(zip(claim.expectations, found["expectations"])):
        of = f"{m['verdict']}: " if len(claim.expect) > 1 else ""
        seen = f"{of}{m['difference']:+.3g} ({m['interval'][0]:+.3g} to {m['interval'][1]:+.3g})"
        yield (
            f"| {first if not i else '|'} | {_shown(e)} | {seen} | {len(found['seeds']) if not i else ''} |"
            f" {linked if not i else ''} |"
        )


def _shown(e: Expectation) -> str:
    words = f"{e.left} = {e.right} within" if e.sign == "=" else f"{e.left} {e.sign} {e.right} by"
    return f"{words} {e.effect:g} in `{e.metric}`".replace("<", "&lt;")


def _paragraph(claim: Claim, verdict: str, found: dict | None) -> Iterator[str]:
    yield f"{claim.claim.strip()} {claim.budget.strip()}".strip()
    yield ""
    if claim.untestable:
        yield f"Not testable here: {claim.untestable}"
        return
    if not found or verdict != found["verdict"]:
        yield f"{verdict[:1].upper()}{verdict[1:]}: `luthier claims {claim.name}`."
        return
    for m in found["expectations"]:
        arms = [k for k, v in m.items() if isinstance(v, list) and k not in ("interval", "bootstrap")]
        seen = ", ".join(f"{arm} {' '.join(f'{v:.4g}' for v in m[arm])}" for arm in arms)
        low, high = m["bootstrap"]
        yield (
            f"- `{m['metric']}` by seed: {seen}. {m['verdict'].capitalize()}. Bootstrap over seeds, too"
            f" narrow with few: {low:+.3g} to {high:+.3g}."
        )
    if found["sweeps"]:
        yield ""
        yield (
            f"{_words(claim.sweep).capitalize()}s, by the {found['select']} of seed {found['tuning_seed']}: "
            + "; ".join(
                f"{arm} {found['learning_rates'][arm]:g} of {', '.join(tried)}"
                + (" (at the edge of its sweep)" if arm in found["at_edge"] else "")
                for arm, tried in found["sweeps"].items()
            )
            + "."
        )
    m = found["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    yield ""
    yield (
        f"{found['date']}, {found['seconds']} s, {m['cpu']}, {m['cores']} cores, threads {m['threads']},"
        f" {m['dtype']}; {versions}."
    )
