"""Compare recipes: the same rows, the same seeds, the same budget, many ways to fine-tune, one fair answer.

An arm is a recipe; every arm runs with every seed, each run in a process of its own (so that its memory and
time are its own). All are measured on the same held-out rows, and compared pair by pair over seeds and rows
(luthier/study/statistics.py): a difference is only reported where its own interval, corrected for all pairs
that were tested, supports it. Everything lies in one folder; the same command resumes where it was stopped.

`spec.py` says what is compared and refuses what is not comparable, `run.py` runs it, `judge.py` turns the
runs' reports into the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.recipe.recipe import Recipe
from luthier.study.compare.judge import ArmResult, judge, sentence
from luthier.study.compare.run import run_comparison
from luthier.study.compare.spec import (
    ALPHA,
    DEFAULT_EVALUATORS,
    TUNING_SEED,
    ComparisonSpec,
    arms_of,
    parse_budget,
    parse_learning_rates,
    resolve_arms,
)

__all__ = [
    "ALPHA",
    "DEFAULT_EVALUATORS",
    "TUNING_SEED",
    "ArmResult",
    "ComparisonSpec",
    "arms_of",
    "compare",
    "judge",
    "parse_budget",
    "parse_learning_rates",
    "resolve_arms",
    "run_comparison",
    "sentence",
]


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
    callback: Any = None,
    **shared: Any,
) -> dict[str, Any]:
    """Compare recipes and return the result, which is also written to FOLDER/comparison.json and report.html.

    Args:
        arms: name -> a recipe's file, mapping or Recipe.
        seeds: runs of each arm.
        budget: of each run, as "30m", "500 steps" or "200k tokens"; None: as the recipes say.
        metric: by which arms are ranked and stopped early.
        stop_early: stop arms that are significantly behind the best.
        learning_rates: of which each arm takes its best, by a run with a seed that is not reported.
        together: LoRA runs that share a base model train side by side in one process.
        folder: default runs/compare-<fingerprint>.
        callback: called as the runs go on.
        shared: recipe keys of all arms.

    Raises:
        RecipeError: the arms cannot be compared.

    Examples:
        >>> luthier.compare(
        ...     {"lora": {"tuner": "lora"}, "full": {"tuner": "full"}}, data="rows.jsonl", budget="100 steps"
        ... )
    """
    recipes = {str(name): Recipe.load(arm, shared) for name, arm in arms.items()}
    spec = ComparisonSpec(
        recipes,
        seeds,
        budget,
        metric,
        stop_early,
        together=together,
        learning_rates=tuple(learning_rates),
    )
    return run_comparison(spec, Path(folder) if folder else None, callback)
