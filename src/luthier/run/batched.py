"""Several LoRA runs on one frozen base in one process: the base is loaded once, rows are tokenized once, a
reference is read once, and steps are made together (train/batched_lora.py).

Every run has its own folder, seed, rows, optimizer and checkpoints, and ends as it would alone, up to
rounding.

python -m luthier.run.batched RUNS.json: {"runs": [[recipe, folder], ...], "stop_at": ...}, as `luthier
compare` starts it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from luthier import compat
from luthier.compat import caller
from luthier.errors import RecipeError
from luthier.model.load import load_model
from luthier.processes import group
from luthier.recipe.recipe import Recipe
from luthier.report.console import Callback
from luthier.run.caches import SharedBase
from luthier.run.finish import finish
from luthier.run.folder import write_inline_rows
from luthier.run.prepare import Prepared, prepare
from luthier.run.report import Report
from luthier.run.session import Session, open_session, step_count
from luthier.run.training import Trained, recorded
from luthier.storage import files
from luthier.storage.failure import report_outcome
from luthier.train import memory
from luthier.train.batched_lora import BatchedTrainer, share_hidden_cache

# settings in which runs that share a base may differ
OWN = (
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
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
    if recipe.compares_evaluations:
        return None
    if recipe.plan is not None or recipe.online_stages or recipe.stages or recipe.init_from is not None:
        return None
    common = {k: v for k, v in settings.items() if k not in OWN}
    return json.dumps(common, sort_keys=True, default=str)


@compat.session()
@caller.restored()
@group.together()
def perform(
    runs: Sequence[tuple[Recipe, Path]], callback: Any = None, stop_at: float | None = None
) -> list[Report]:
    """Runs of one `shared_key`, to their ends or to where they pause: their reports, in order."""
    callback = callback or Callback()
    reports: dict[Path, Report] = {}
    sessions: list[Session] = []
    with ExitStack() as stack:
        for recipe, folder in runs:
            recipe = write_inline_rows(recipe, folder)
            session = stack.enter_context(open_session(recipe, folder, stop_at=stop_at))
            if isinstance(session, Report):
                reports[folder] = session
            else:
                sessions.append(session)
        if sessions:
            shared = _load_base(sessions[0])
            prepared = [prepare(session, shared) for session in sessions]
            trained = _train(prepared, callback)
            for run in trained:
                reports[run.prepared.session.folder] = finish(run).report
            if all(run.complete for run in trained):
                for cache in shared.logprob_caches.values():
                    cache.close()
    return [reports[folder] for _, folder in runs]


def _load_base(session: Session) -> SharedBase:
    """The model that all runs share, by the recipe of the first."""
    network = session.methods.architecture.fit_to(session.data.rows)
    model, tokenizer = load_model(session.recipe, session.methods, network, session.folder)
    return SharedBase(model, tokenizer)


def _train(runs: Sequence[Prepared], callback: Any) -> list[Trained]:
    """Step all runs to their ends or to where they pause, in one pass over the base where that is faster."""
    trainers = [run.trainer for run in runs]
    share_hidden_cache(trainers)

    def warn(sentence: str) -> None:
        for listener in (callback, *(run.session.callback for run in runs)):
            listener.warn(sentence)

    batched = BatchedTrainer(trainers, warn)
    need = sum(run.memory_need.total for run in runs if run.memory_need)
    available = memory.free(trainers[0].roles.device)
    if batched.why_not_joint is None and available and need > memory.SURE * available:
        batched.why_not_joint = f"a joint pass needs {memory.gb(need)}, but {memory.gb(available)} are free"
    if batched.why_not_joint:
        warn(
            f"{len(runs)} runs share one base model but are trained one after the other:"
            f" {batched.why_not_joint}"
        )
    clocks = [trainer.roles.clock for trainer in trainers]
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(recorded(run))
        last_steps = []
        for run, clock in zip(runs, clocks, strict=True):
            last_steps.append(step_count(run.session.stop_at, clock.total) or None)
        batched.run(last_steps)
    trained = []
    for run, clock in zip(runs, clocks, strict=True):
        trained.append(Trained(run, clock.step >= clock.total))
    return trained


def main(path: str) -> None:
    """Perform the runs that a file lists."""
    listing = files.read_json(Path(path))
    runs = [(Recipe.load(settings), Path(folder)) for settings, folder in listing["runs"]]
    perform(runs, stop_at=listing["stop_at"])


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except RecipeError as error:
        report_outcome(error)
        sys.exit(f"luthier: {error}")
