"""A claim's file: which arms run, what is measured, and which difference is expected."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.errors import RecipeError
from luthier.recipe.catalogue import claims_folder
from luthier.registry import did_you_mean, format_errors
from luthier.storage.bounded_yaml import read_yaml
from luthier.storage.toy import OLD_PREFIX, PREFIX, is_toy

HOLDS, FAILS, UNDECIDED, UNTESTABLE = "held", "not held", "undecided", "not testable here"
SKIPPED = "skipped"  # not run now, as its model is not here
BEFORE = "before"  # the arm that is the other arm before training
TUNING_SEED = 1000  # of the runs that pick a learning rate; test seeds are 0, 1, 2, ...
PILOT_SEEDS = 8
MAX_SEEDS = 20
# the model of second runs, NAME_real.yaml; it is no part of the repository
REAL_MODEL = "build/smollm2"
ROWS = "rows/"  # below the folder of claims: their real rows
# of every arm, unless the file says otherwise
DEFAULTS = {"save_steps": 100_000, "evaluate": ["loss", "accuracy"]}
NUMBER = r"\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
EXPECTED = re.compile(rf"(\w+) (?:([<>]) (\w+) by|= (\w+) within) (-?{NUMBER})(?: in (\S+))?")
SELECTED = re.compile(r"(lowest|highest) (\S+)")

# of a claim's text -> as version 0.1 wrote it, whose results stay valid
FORMER_NAMES = {
    f'"{PREFIX}': f'"{OLD_PREFIX}',
    '"reward": "task"': '"reward": "world"',
    '{"name": "task", "objective"': '{"name": "world", "objective"',
}


@dataclass(frozen=True)
class Expectation:
    """One line of `expect`, parsed."""

    text: str
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
                return HOLDS
            if low > self.effect or high < -self.effect:
                return FAILS
            return UNDECIDED
        if self.sign == "<":
            low, high = -high, -low
        if low >= self.effect:
            return HOLDS
        if high < self.effect:
            return FAILS
        return UNDECIDED


class Claim(BaseModel):
    """A claim's file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(exclude=True)  # of the file
    claim: str  # what the paper reports, in a sentence
    paper: str | None = None  # arXiv:...
    row: str = ""  # the paper's short name in the catalogue, if it has one
    # what of the paper is there, what is not, and the tests that show it, where no method's file says it
    covers: str = ""
    omits: str = ""
    tests: list[str] = []
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
    # test seeds of the pilot, whose spread decides how many more are run where they do not decide it
    seeds: Annotated[int, Field(ge=2, le=MAX_SEEDS)] = PILOT_SEEDS
    budget: str = ""  # what is equal between the arms, in words
    fresh: bool = False  # each run in a process of its own, so that its peak of memory is its own
    untestable: str = ""  # why it cannot be tried here, if so
    attempts: str = ""  # of a claim that is not held: what was changed to make it hold, and what came of it

    @property
    def expectations(self) -> list[Expectation]:
        """`expect`, parsed. Raises RecipeError where a line is not understood or names no arm."""
        return [self._parse(text) for text in self.expect]

    def _parse(self, text: str) -> Expectation:
        match = EXPECTED.fullmatch(" ".join(text.split()))
        if not match:
            raise self.error(
                f"expect: '{text}' must have the form `A > B by 0.02`, `A < B by 0.02` or `A ="
                " B within 0.02` (optionally with `in METRIC`)"
            )
        left, sign, right, equal, effect, metric = match.groups()
        arms = [*self.arms, BEFORE]
        for arm in (left, right or equal):
            if arm not in arms:
                raise self.error(f"expect: there is no arm '{arm}'{did_you_mean(arm, arms)}")
        if equal and float(effect) < 0:
            raise self.error(f"expect: '{text}': the tolerance must not be negative")
        if left == (right or equal):
            raise self.error(f"expect: '{text}' compares an arm with itself")
        if not (metric or self.metric):
            raise self.error(f"expect: '{text}' has no metric, and the file sets none either")
        measured = metric or self.metric
        if BEFORE in (left, right or equal) and measured.startswith("stats."):
            raise self.error(
                f"expect: '{text}': {measured} is measured of a whole run, so there is none before training"
            )
        return Expectation(text, left, sign or "=", right or equal, float(effect), measured)

    @property
    def selection(self) -> tuple[str, str]:
        """`select` as (lowest or highest, METRIC)."""
        match = SELECTED.fullmatch(self.select)
        if not match:
            raise self.error(f"select: '{self.select}' must be `lowest METRIC` or `highest METRIC`")
        return match[1], match[2]

    @property
    def absent(self) -> str:
        """What has to be brought before it can run, in a sentence; empty where everything is there."""
        models = [{**self.shared, **keys}.get("model") for keys in self.arms.values()]
        if REAL_MODEL in models and not (Path(REAL_MODEL) / "config.json").is_file():
            return f"{REAL_MODEL} is not here; `python -m luthier.toy.real {REAL_MODEL}` brings it"
        return ""

    def sweep_values(self, arm: str) -> list[float]:
        """The learning rates, or whatever is swept, of which an arm takes its best; empty where it has one or
        none.
        """
        key, _, setting = self.sweep.partition(".")
        values = {**self.shared, **self.arms[arm]}.get(key)
        if setting and isinstance(values, dict):
            values = values.get(setting)
        if not isinstance(values, list):
            return []
        return [float(value) for value in values]

    def recipe(self, arm: str, seed: int, value: float | None = None) -> dict[str, Any]:
        """The recipe keys of one run; value: of what is swept. The run's seed draws the rows of toy tasks;
        files of rows lie beside the claims.
        """
        keys = {**DEFAULTS, **self.shared, **self.arms[arm], "seed": seed}
        if value is not None:
            key, _, setting = self.sweep.partition(".")
            if setting:
                keys[key] = {**keys[key], setting: value}
            else:
                keys[key] = value
        for key in ("data", "eval_data"):
            if key in keys:
                keys[key] = _with_seed(keys[key], seed)
        return keys

    def same_rows(self, metric: str) -> bool:
        """Whether all seeds measure a metric on the same rows: those of other tasks, or fixed held-out
        ones. Otherwise each seed draws its own.
        """
        from luthier.registry import evaluator_of

        if evaluator_of(metric) == "forgetting":
            return True
        for arm in self.arms:
            first, second = self.recipe(arm, 0), self.recipe(arm, 1)
            if "eval_data" not in first or first["eval_data"] != second["eval_data"]:
                return False
        return True

    def runs(self, seeds: int) -> tuple[list[tuple[str, int, float]], list[tuple[str, int]]]:
        """The runs that pick a swept value, (arm, seed, value), and those that are reported, (arm, seed): the
        arms of a seed one after the other.
        """
        sweep = []
        for arm in self.arms:
            values = self.sweep_values(arm)
            if len(values) > 1:
                sweep += [(arm, TUNING_SEED, value) for value in values]
        tests = []
        for seed in range(seeds):
            tests += [(arm, seed) for arm in self.arms]
        return sweep, tests

    def fingerprint(self) -> str:
        """What a result is a result of: all but the words around it and the number of seeds."""
        fields = self.model_dump(include={"shared", "arms", "metric", "select", "expect", "fresh"})
        if self.sweep != "learning_rate":
            fields["sweep"] = self.sweep
        text = json.dumps(fields, sort_keys=True, default=str)
        for name, former in FORMER_NAMES.items():
            text = text.replace(name, former)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def error(self, why: str) -> RecipeError:
        return RecipeError(f"claim {self.name}: {why}")


def sweep_label(key: str) -> str:
    """tuner.lora_dropout -> 'lora dropout'."""
    return key.rpartition(".")[2].replace("_", " ")


def _with_seed(data: Any, seed: int) -> Any:
    """`data` whose toy tasks are drawn by a seed, where the file does not set another, and whose rows/NAME is
    the file in the folder of claims.
    """
    if isinstance(data, list):
        return [_with_seed(part, seed) for part in data]
    source = {"path": data} if isinstance(data, str) else data
    if isinstance(source, Mapping) and is_toy(source.get("path")):
        return {"seed": seed, **source}
    if isinstance(source, Mapping) and str(source.get("path", "")).startswith(ROWS):
        return {**source, "path": str(claims_folder() / source["path"])}
    return data


# ------------------------------------------------------------------------------------------------ files


def claim_names(folder: Path | None = None) -> list[str]:
    return sorted(path.stem for path in (folder or claims_folder()).glob("*.yaml"))


def all_claims() -> list[str]:
    """The names of all claims. Raises RecipeError where there are none."""
    names = claim_names()
    if not names:
        raise RecipeError(
            f"{claims_folder()} does not exist: claims are part of the luthier repository; run"
            " this command in a clone"
        )
    return names


def read_claim(name: str, folder: Path | None = None) -> Claim:
    """A claim by name. Raises RecipeError for a file that is not a valid claim."""
    folder = folder or claims_folder()
    path = folder / f"{name}.yaml"
    if not path.is_file():
        names = claim_names(folder)
        if not names:
            raise RecipeError(f"there is no claim '{name}' in {folder}")
        raise RecipeError(f"there is no claim '{name}'{did_you_mean(name, names)}")
    try:
        fields = read_yaml(path)
    except RecipeError as error:
        raise RecipeError(f"claim {error}") from None
    if not isinstance(fields, dict):
        raise RecipeError(
            f"claim {name}: a claim must be a mapping of `key: value`, not {type(fields).__name__}"
        )
    allowed = [key for key in Claim.model_fields if key != "name"]
    for key in fields:
        if key not in allowed:
            raise RecipeError(f"claim {name}: a claim has no key '{key}'{did_you_mean(key, allowed)}")
    if isinstance(fields.get("expect"), str):
        fields["expect"] = [fields["expect"]]
    try:
        claim = Claim(name=name, **fields)
    except ValidationError as error:
        raise RecipeError(f"claim {name}: {format_errors(error)}") from None
    check(claim)
    return claim


def check(claim: Claim) -> None:
    """Refuse what no run could make sense of; the methods that arms name are checked when it is run."""
    from luthier.recipe.catalogue import all_papers

    papers = [paper["name"] for paper in all_papers()]
    for row in claim.row.split():
        if row not in papers:
            raise claim.error(f"row: the paper catalogue has no '{row}'{did_you_mean(row, papers)}")
    if claim.untestable:
        return
    if not claim.arms or not claim.expect:
        raise claim.error("a claim needs `arms` and `expect`, or `untestable` with the reason")
    if BEFORE in claim.arms:
        raise claim.error(f"the arm name '{BEFORE}' is reserved for the other arm before training")
    assert claim.selection and claim.expectations  # both raise where they are not understood
    for arm in claim.arms:
        _check_arm(claim, arm)


def _check_arm(claim: Claim, arm: str) -> None:
    from luthier.recipe.recipe import Recipe

    if not re.fullmatch(r"\w+", arm):
        raise claim.error(f"arm name '{arm}': use only letters, digits and underscores")
    try:
        value = next(iter(claim.sweep_values(arm)), None)
    except (TypeError, ValueError):
        raise claim.error(f"arm {arm}: the list under {claim.sweep} must contain only numbers") from None
    try:
        Recipe.load(claim.recipe(arm, 0, value))
    except RecipeError as error:
        raise claim.error(f"arm {arm}: {error}") from None
