"""Optimizers on small workloads: who reaches a tuned baseline's loss first, each with the same budget of
learning rates. Played by plan `optimizer_benchmark`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.registry import did_you_mean, names

OPTIMIZERS = ("adamw", "lion", "prodigy", "sgd")  # the first sets the targets
# name -> changes of the recipe: two tasks by LoRA, and one by all weights
WORKLOADS: dict[str, dict[str, Any]] = {
    "arithmetic": {"data": {"path": "toy:arithmetic/new", "n": 200}},
    "people": {"data": {"path": "toy:people/new", "n": 200}},
    "style, all weights": {"data": {"path": "toy:style/new", "n": 200}, "tuner": "full"},
}


def bench_optimizers(
    optimizers: Sequence[str] | None = None,
    *,
    model: str | None = None,
    data: str | None = None,
    trials: int = 3,
    studies: int = 1,
    steps: int = 40,
    output_dir: Path | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """{"table": a line for each optimizer, the best first, "targets": workload -> loss}.

    optimizers: the first sets the targets. model, data: one workload of a model and rows of one's own, by
    LoRA, in place of the three small ones. trials: learning rates that each optimizer may try on a workload,
    in each of `studies`; the best counts, and the median over studies. With `output_dir` the runs stay
    there, optimizers.json beside them, and the same call goes on where it was stopped. Raises RecipeError.
    """
    from luthier.run.run import tune

    recipe = recipe_of(optimizers, model, data, trials, studies, steps)
    tell(f"{len(recipe['plan']['optimizers'])} optimizers, {len(recipe['plan']['workloads'])} workloads")
    with tempfile.TemporaryDirectory(prefix="luthier-bench-", ignore_cleanup_errors=True) as scratch:
        report = tune(recipe, folder=(output_dir or Path(scratch)) / "optimizers")
        result = {"table": report.stats["table"], "targets": report.stats["targets"]}
    tell(table(result))
    if output_dir is not None:
        text = json.dumps(result, indent=1) + "\n"
        (output_dir / "optimizers.json").write_text(text, encoding="utf-8")
    return result


def recipe_of(
    optimizers: Sequence[str] | None,
    model: str | None,
    data: str | None,
    trials: int,
    studies: int,
    steps: int,
) -> dict[str, Any]:
    """What is run."""
    optimizers = list(optimizers or OPTIMIZERS)
    for name in optimizers:
        if name not in names("optimizer"):
            raise RecipeError(f"there is no optimizer '{name}'{did_you_mean(name, names('optimizer'))}")
    workloads = WORKLOADS
    if data is not None:
        workloads = {Path(data).name or data: {"data": data}}
    plan = {
        "name": "optimizer_benchmark",
        "optimizers": optimizers,
        "workloads": workloads,
        "trials": trials,
        "studies": studies,
    }
    first = next(iter(workloads.values()))
    return {
        "model": model or "toy:lm-small",
        "tuner": "lora",
        "max_steps": steps,
        "logging_steps": 1,
        "evaluate": [],
        "plan": plan,
        **first,
    }


def table(result: dict[str, Any]) -> str:
    """For the terminal: scores from 0 to 1, and steps to the target of each workload."""
    targets = result["targets"]
    heads = " ".join(f"{name:>18}" for name in targets)
    lines = [f"{'optimizer':<14} {'score':>6} {'untuned':>8} {'one rate':>9} {heads}"]
    for line in result["table"]:
        cells = []
        for name in targets:
            steps = line[f"steps: {name}"]
            cells.append(f"{'never' if steps is None else f'{steps:g} steps':>18}")
        lines.append(
            f"{line['optimizer']:<14} {line['score']:>6.3f} {line['default']:>8.3f}"
            f" {line['one rate']:>9.3f} {' '.join(cells)}"
        )
    aims = ", ".join(f"{name} {loss:.3f}" for name, loss in targets.items())
    return "\n".join([*lines, f"losses to reach: {aims}"])
