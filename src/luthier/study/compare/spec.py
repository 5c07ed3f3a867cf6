"""What is compared: arms, seeds, budget and metric; and what must be equal between arms for a comparison."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.load import load_data, sample_rows
from luthier.errors import RecipeError, from_code
from luthier.model.load import try_attach
from luthier.recipe.capabilities import columns_of, requirements
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import dry_run, first_run, validate
from luthier.registry import build, evaluator_of, provides_of
from luthier.train.checks import check_trainable

DEFAULT_EVALUATORS = ("loss", "accuracy", "generate", "forgetting", "calibration", "diversity")
# recipe keys that must be the same in all arms, or nothing is comparable
MUST_MATCH = (
    "data",
    "eval_data",
    "max_length",
    "chat_template",
    "chat_template_kwargs",
    "split_special_tokens",
    "evaluate",
)
# recipe keys that may differ; the result notes where they do
MAY_DIFFER = ("model", "dtype", "per_device_train_batch_size", "gradient_accumulation_steps")
RETENTION = ("retention_loss", "retention_accuracy")
# the axes of the Pareto front, beside the metric
FRONT_METRICS = (*RETENTION, "trained", "peak_memory_mb", "seconds")
ALPHA = 0.05  # family-wise error rate over all pairs of a metric
TUNING_SEED = 1000  # of the runs that pick learning rates; no reported run has it
SAMPLE = 100  # rows by which recipes are validated

BUDGET = re.compile(r"([\d.]+)\s*([kKM]?)\s*(s|m|min|h|steps?|tokens?|)")
MULTIPLES = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6}
SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600}


@dataclass(frozen=True)
class ComparisonSpec:
    """Arms, and how they are compared."""

    arms: dict[str, Recipe]
    seeds: int = 3
    # "30m" of steps, "200k tokens" or "500 steps", for each arm and seed; None: as the recipes say
    budget: str | None = None
    metric: str = "loss"  # by which arms are ranked and stopped
    stop_early: bool = True  # stop arms that cannot win, where there are more than two
    subprocesses: bool = True  # each run in a process of its own
    # LoRA runs that share a base model train side by side; their peak memory is then not known
    together: bool = False
    seed_values: tuple[int, ...] = ()  # in place of 0, 1, 2, ...
    # of which each arm takes its best, by a run with TUNING_SEED
    learning_rates: tuple[float, ...] = ()
    least_steps: int = 30  # no arm is stopped early before so many steps

    def settings(self) -> dict[str, Any]:
        """What decides the result but the arms and `least_steps`, as plain data."""
        return {
            "seeds": self.seeds,
            "budget": self.budget,
            "metric": self.metric,
            "stop_early": self.stop_early,
            "learning_rates": list(self.learning_rates),
            "seed_values": list(self.seed_values),
        }

    def fingerprint(self) -> str:
        """Of everything that decides the result; a folder holds one comparison."""
        recipes = {name: recipe.public() for name, recipe in self.arms.items()}
        parts = [recipes, self.seeds, self.budget, self.metric, self.stop_early]
        parts += filter(None, (self.learning_rates, self.seed_values))
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def join_names(names: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]}"


# ------------------------------------------------------------------------------------------- arms


def arms_of(
    recipes: Sequence[str],
    changes: Sequence[str] = (),
    tuners: str = "",
    objectives: str = "",
    least: int = 2,
) -> dict[str, Recipe]:
    """Recipes by the stems of their files, or every combination of tuners and objectives on one recipe.

    recipes: files. changes: "key=value" for all of them. tuners, objectives: comma-separated names. least:
    arms that a comparison needs, 1 where they are added to others.
    """
    if len(recipes) > 1 and (tuners or objectives):
        raise RecipeError("--tuners and --objectives vary a single recipe; pass only one")
    if tuners or objectives:
        source = Path(recipes[0]) if recipes else None
        return _grid(Recipe.load(source, changes), _split(tuners), _split(objectives))
    if len(recipes) < least:
        raise RecipeError("a comparison needs two recipes or more, or --tuners a,b,c")
    paths = list(map(Path, recipes))
    stems = {path.stem for path in paths}
    arms: dict[str, Recipe] = {}
    for path in paths:
        name = path.stem
        if len(stems) < len(paths):  # two files of one name: called after their paths
            name = re.sub(r"[^\w.-]+", "-", str(path.with_suffix(""))).strip("-")
        if name in arms:
            raise RecipeError(f"two of these recipes are the same file: {', '.join(recipes)}")
        arms[name] = Recipe.load(path, changes)
    return arms


def _grid(base: Recipe, tuners: list[str], objectives: list[str]) -> dict[str, Recipe]:
    """Every tuner with every objective; an arm is called after what varies."""
    arms = {}
    for tuner in tuners or [None]:
        for objective in objectives or [None]:
            changes = {}
            if tuner:
                changes["tuner"] = tuner
            if objective:
                changes["objective"] = objective
            labels = list(changes.values())
            if tuner and len(objectives) == 1:  # the same in all arms
                labels = [tuner]
            name = "-".join(re.sub(r"[^\w.]+", "_", label).strip("_") for label in labels)
            arms[name] = _at_its_rate(base, base.but(**changes))
    return arms


def _at_its_rate(base: Recipe, arm: Recipe) -> Recipe:
    """An arm of a grid at a learning rate of its own, unless one was given for all arms: what its tuner and
    objective have by default, as many times as the recipe's rate is a multiple of its own default.
    """
    if base.origins.get("learning_rate") in ("default", "command line"):
        return arm
    ratio = base.learning_rate / base.default_rate().value
    return arm.but(learning_rate=float(f"{ratio * arm.default_rate().value:.6g}"))


def _split(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_learning_rates(text: str) -> tuple[float, ...]:
    """'1e-4,1e-3' -> (1e-4, 1e-3). Raises RecipeError for anything but numbers."""
    try:
        return tuple(map(float, _split(text)))
    except ValueError:
        raise RecipeError(f"--learning-rates: '{text}' must be numbers such as 1e-4,1e-3") from None


def parse_budget(budget: str) -> tuple[str, float]:
    """'30m' -> ('seconds', 1800), '500' -> ('steps', 500), '2M tokens' -> ('tokens', 2e6)."""
    match = BUDGET.fullmatch(budget.strip())
    if not match or (match[2] and match[3] in SECONDS):
        raise RecipeError(
            f"--budget: '{budget}' must be a time (30m, 90s, 2h), steps (500 steps) or tokens (200k tokens)"
        )
    size = float(match[1]) * MULTIPLES[match[2]]
    if match[3] in SECONDS:
        return "seconds", size * SECONDS[match[3]]
    if match[3].startswith("token"):
        return "tokens", size
    return "steps", size


# ----------------------------------------------------------------------------- what must be equal


def resolve_arms(spec: ComparisonSpec) -> tuple[dict[str, Recipe], list[str], dict[str, RecipeError]]:
    """The arms as they will run, all measured alike; notes for the reader; and the arms that cannot run, with
    the reason. Raises RecipeError for what cannot be compared, and where fewer than two arms can run.
    """
    _check_settings(spec)
    notes = _check_keys(spec.arms)
    data = load_data(next(iter(spec.arms.values())))
    arms: dict[str, Recipe] = {}
    unable: dict[str, RecipeError] = {}
    for name, recipe in spec.arms.items():
        try:
            arms[name] = _resolve_arm(name, recipe, data.rows[:SAMPLE], spec.metric)
        except RecipeError as error:
            unable[name] = error
    if len(arms) < 2:
        raise next(iter(unable.values()))
    notes += _rates(arms)
    arms, shared = _share_evaluators(arms)
    if shared is not None:
        notes.append(f"evaluated with the evaluators that every arm supports: {', '.join(shared)}")
    plans = _plans(spec.arms)
    if plans:
        notes.append(
            f"{join_names(plans)}: time is the sum over the plan's runs, memory the maximum; no"
            " arm is stopped early"
        )
    if not data.held_out:
        notes.append("there are no held-out rows: arms are compared on their training rows")
    if spec.seeds == 1:
        notes.append("only one seed: the differences may not hold for other seeds (use --seeds)")
    return arms, notes, unable


def _rates(arms: Mapping[str, Recipe]) -> list[str]:
    """A note of the arms' learning rates where they differ."""
    rates = {name: recipe.learning_rate for name, recipe in arms.items()}
    if len(set(rates.values())) < 2:
        return []
    listed = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    return [f"learning rates: {listed} (--learning-rates searches for the best of each)"]


def _check_settings(spec: ComparisonSpec) -> None:
    """Refuse numbers of arms, seeds and learning rates that make no comparison."""
    if len(spec.arms) < 2:
        raise RecipeError("a comparison needs two arms or more")
    if not 1 <= spec.seeds <= TUNING_SEED:
        raise RecipeError(f"--seeds: {spec.seeds} must be a number from 1 to {TUNING_SEED}")
    rates = spec.learning_rates
    if rates and (len(set(rates)) < 2 or min(rates) <= 0):
        raise RecipeError(
            f"--learning-rates: give two or more values above 0, not {', '.join(map(str, rates))}"
        )
    plans = _plans(spec.arms)
    if plans and spec.budget:
        raise RecipeError(
            f"--budget: {plans[0]} is a plan of several runs, which --budget cannot divide; set"
            " max_steps in the recipes"
        )


def _plans(arms: Mapping[str, Recipe]) -> list[str]:
    return [name for name, recipe in arms.items() if recipe.plan is not None]


def _check_keys(arms: Mapping[str, Recipe]) -> list[str]:
    """Refuse arms that would not be measured alike; notes of other keys that differ from the first arm's."""
    notes = []
    first, reference = next(iter(arms.items()))
    for name, recipe in arms.items():
        for key in MUST_MATCH:
            ours, theirs = getattr(reference, key), getattr(recipe, key)
            if ours != theirs:
                raise RecipeError(
                    f"arms {first} and {name} differ in {key} ({_short(ours)} and"
                    f" {_short(theirs)}), so their results could not be compared"
                )
        for key in MAY_DIFFER:
            ours, theirs = getattr(reference, key), getattr(recipe, key)
            if ours != theirs:
                notes.append(
                    f"{name} differs from {first} in {key}: {_short(theirs)} instead of {_short(ours)}"
                )
    return notes


def _short(value: Any) -> str:
    return str(value)[:60]


def _resolve_arm(name: str, recipe: Recipe, rows: list[dict], metric: str) -> Recipe:
    """The arm's recipe, validated on some rows, with the evaluators that suit it."""
    try:
        if recipe.plan is not None:
            validate(recipe, rows, sample_rows)
        built = dry_run(first_run(recipe), rows)
        attached = try_attach(first_run(recipe), built, rows)
        if attached is not None:
            check_trainable(attached)
    except RecipeError as error:
        raise from_code(error.code, f"arm {name}: {error}") from None
    if recipe.evaluate is None:
        recipe = recipe.but(evaluate=default_evaluators(built, rows, metric))
    return recipe.but(save_steps=0.5, save_total_limit=1, report_to=[])


def default_evaluators(built: Any, rows: Sequence[dict], metric: str) -> list[str]:
    """Those of DEFAULT_EVALUATORS, and what measures the metric, whose requirements the built methods of a
    recipe and its rows meet.
    """
    names = [*DEFAULT_EVALUATORS]
    measures_metric = evaluator_of(metric)
    if measures_metric is not None and measures_metric not in names:
        names.append(measures_metric)
    available = (
        columns_of(rows)
        | built.architecture.provides
        | built.estimator.provides
        | provides_of(built.tuner)
        | set(built.roles)
    )
    usable = []
    for name in names:
        try:
            evaluator = build("evaluator", name)
        except RecipeError:
            continue  # it needs settings: the recipes bring it
        if requirements(evaluator) <= available:
            usable.append(name)
    return usable


def _share_evaluators(arms: dict[str, Recipe]) -> tuple[dict[str, Recipe], list[str] | None]:
    """Arms that all have the same evaluators, and these where some arm had others; else None."""
    first, *others = [evaluator_names(recipe) for recipe in arms.values()]
    shared = first
    for names in others:
        shared = [name for name in shared if name in names]
    if all(names == first for names in others):
        return arms, None
    return {name: recipe.but(evaluate=shared) for name, recipe in arms.items()}, shared


def evaluator_names(recipe: Recipe) -> list[Any]:
    """Of a recipe's `evaluate`, whose entries are names or mappings with a name."""
    names = []
    for evaluator in recipe.evaluate or ():
        if isinstance(evaluator, Mapping):
            evaluator = evaluator.get("name")
        names.append(evaluator)
    return names
