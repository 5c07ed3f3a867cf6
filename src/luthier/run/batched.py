"""Several LoRA runs on one frozen base in one process: the base is loaded once, rows are tokenized once, a
reference is read once, and steps are made together (train/batched_lora.py).

Every run has its own folder, seed, rows, optimizer and checkpoints, and ends as it would alone, up to rounding.

python -m luthier.run.batched RUNS.json: {"runs": [[recipe, folder], ...], "until": ...}, as `luthier compare`
starts it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from luthier import compat
from luthier.errors import RecipeError
from luthier.model.load import load_model
from luthier.recipe.recipe import Recipe
from luthier.report.console import Callback
from luthier.run.folder import on_disk
from luthier.run.run import Report, Shared, opened
from luthier.train import memory
from luthier.train.batched_lora import BatchedTrainer, share_hidden_cache

# settings in which runs that share a base may differ
OWN = (
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "tuner",
    "output_dir",
    "save_steps",
    "logging_steps",
)


def shared_key(recipe: Recipe) -> str | None:
    """Recipes of one key can share a base; None where a recipe must run alone."""
    settings = recipe.public()
    tuner = settings["tuner"] if isinstance(settings["tuner"], dict) else {"name": settings["tuner"]}
    if tuner.get("name") != "lora" or recipe.quantization is not None or recipe.objective is None:
        return None
    if recipe.plan is not None or recipe.online_stages or recipe.stages or recipe.init_from is not None:
        return None
    common = {k: v for k, v in settings.items() if k not in OWN}
    return json.dumps(common, sort_keys=True, default=str)


@compat.session()
def perform(runs: Sequence[tuple[Recipe, Path]], watch: Any = None, until: float | None = None) -> list[Any]:
    """Runs of one `shared_key`, to their ends or paused at `until`: their reports, in order."""
    with ExitStack() as stack:
        every: list[Any] = []
        for recipe, folder in runs:
            run = opened(on_disk(recipe, folder), folder, Callback(), until=until)
            every.append(stack.enter_context(run))
        unfinished = [run for run in every if not isinstance(run, Report)]
        if not unfinished:
            return every
        shared = _train(unfinished, watch or Callback(), until)
        reports = [run if isinstance(run, Report) else run.ended() for run in every]
        clocks = [run.fit.roles.clock for run in unfinished]
        if all(clock.step == clock.total for clock in clocks):
            for cache in shared.logprob_caches.values():
                cache.close()
    return reports


def _train(runs: Sequence[Any], watch: Any, until: float | None) -> Shared:
    """Load the base, make the runs ready on it and step them. What they share."""
    first = runs[0]
    parts = first.parts
    shared = Shared(
        *load_model(first.recipe, parts, parts.architecture.fit_to(first.data.rows), first.folder)
    )
    for run in runs:
        run.shared = shared
        run.ready()
    trainers = [run.fit for run in runs]
    share_hidden_cache(trainers)

    def warn(sentence: str) -> None:
        for listener in (watch, *(run.watch for run in runs)):
            listener.warn(sentence)

    batched = BatchedTrainer(trainers, warn)
    need, available = sum(run.need.total for run in runs if run.need), memory.free(first.roles.device)
    if batched.why_not_joint is None and available and need > memory.SURE * available:
        batched.why_not_joint = f"one pass would take {memory.gb(need)} and {memory.gb(available)} are free"
    if batched.why_not_joint:
        warn(f"{len(runs)} runs share one base and step one after the other: {batched.why_not_joint}")
    batched.run([run.every(until) or None for run in runs])
    return shared


def main(path: str) -> None:
    """Perform the runs that a file lists."""
    listed = json.loads(Path(path).read_text(encoding="utf-8"))
    runs = [(Recipe.load(settings), Path(folder)) for settings, folder in listed["runs"]]
    perform(runs, until=listed["until"])


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except RecipeError as error:
        sys.exit(f"luthier: {error}")
