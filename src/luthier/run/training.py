"""From a prepared run to its last step, or to where it pauses: what happens around each step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from luthier.errors import Diverged
from luthier.recipe.capabilities import requirements
from luthier.run import resume
from luthier.run.best import Best, eval_interval, load_best, open_best
from luthier.run.prepare import Prepared
from luthier.run.session import Session, step_count
from luthier.storage import files
from luthier.storage.layout import LOG, read_log
from luthier.train.divergence import diverged, sentence
from luthier.train.trainer import Trainer
from luthier.train.trend import checkpoints_of

TREND_ROWS = 256  # held-out rows at most whose loss is measured at each quarter of a run


@dataclass(frozen=True)
class Trained:
    """A run after its last step, or after the step at which it pauses."""

    prepared: Prepared
    complete: bool  # has it made all its steps?


def train(prepared: Prepared) -> Trained:
    """Every step that is left, or those up to where the session pauses."""
    session, clock = prepared.session, prepared.trainer.roles.clock
    if clock.total:
        last = step_count(session.stop_at, clock.total) or None
        with recorded(prepared), session.callback.training(clock.total, clock.step):
            prepared.trainer.run(last)
    complete = clock.step >= clock.total
    if complete:
        load_best(prepared)
    return Trained(prepared, complete)


@contextmanager
def recorded(prepared: Prepared) -> Iterator[None]:
    """While the trainer steps: logs, evaluations and checkpoints after each step."""
    losses = [line["loss"] for line in read_log(prepared.session.folder) if "loss" in line]
    losses = prepared.session.processes.broadcast(losses)  # the main process has cut the log
    best = open_best(prepared)

    def after_step(trainer: Trainer, log: dict) -> None:
        prepared.session.check_folder()
        _evaluate(prepared, log, best)
        _write_log(prepared, log)
        prepared.session.callback.step(log)
        _save(prepared)
        losses.append(log["loss"])
        _check_divergence(prepared, losses)

    trainer = prepared.trainer
    trainer.hooks = [after_step]
    try:
        yield
    finally:
        # the hook holds the run, which holds the trainer: a circle would keep the model until it is collected
        trainer.hooks = []


def _check_divergence(prepared: Prepared, losses: Sequence[float]) -> None:
    """Raises Diverged where the loss has and the recipe stops then."""
    if not prepared.session.recipe.stop_on_divergence:
        return
    if ends := diverged(losses):
        raise Diverged(f"stopped at step {prepared.trainer.roles.clock.step}: {sentence(*ends)}")


def _at_end(prepared: Prepared) -> bool:
    clock = prepared.trainer.roles.clock
    return clock.step == clock.total


def _evaluate(prepared: Prepared, log: dict, best: Best | None) -> None:
    """Metrics during training into the log, every eval_steps; those of the last step are the report's, and
    are measured here only where they may be the best. Without eval_steps, the held-out loss at each quarter,
    so that the end of the run can be judged.
    """
    session, roles = prepared.session, prepared.trainer.roles
    every = step_count(eval_interval(session.recipe), roles.clock.total)
    now = bool(every) and roles.clock.step % every == 0
    if _at_end(prepared):
        now = best is not None
    elif not every and roles.clock.step in checkpoints_of(roles.clock.total) and fits_likelihood(session):
        if rows := trend_rows(prepared):
            log["eval_loss"] = session.loss(roles, rows)
    if not now:
        return
    metrics = session.evaluate(roles, prepared.eval_rows, "during")
    log |= {f"eval_{k}": v for k, v in metrics.items()}
    if best is not None:
        best.add(roles.clock.step, metrics)


def fits_likelihood(session: Session) -> bool:
    """Whether the loss of good completions, which the run measures, is what its objective lowers: not of
    pairs and samples.
    """
    objective = session.methods.objective
    if objective is None or {"pairs", "samples", "values"} & requirements(objective):
        return False
    return any(evaluator.name == "loss" for evaluator in session.methods.evaluate)


def trend_rows(prepared: Prepared) -> list[dict]:
    """The held-out rows on which the loss is measured at the quarters of a run."""
    return prepared.held_out[:TREND_ROWS]


def _write_log(prepared: Prepared, log: dict) -> None:
    """A line of metrics.jsonl and the trackers' numbers, every logging_steps and at the end."""
    session, step = prepared.session, prepared.trainer.roles.clock.step
    evaluated = any(key.startswith("eval_") for key in log)
    due = step % session.recipe.logging_steps == 0 or _at_end(prepared) or evaluated
    if not session.main or not due:
        return
    numbers = {k: v for k, v in log.items() if k != "step" and not k.startswith("eval_")}
    session.accelerator.log(numbers, step=step)
    with files.disk_errors(session.folder):
        with open(session.folder / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(log) + "\n")


def _save(prepared: Prepared) -> None:
    """A checkpoint, every save_steps and at the end."""
    session, clock = prepared.session, prepared.trainer.roles.clock
    every = step_count(session.recipe.save_steps, clock.total)
    if clock.step % every == 0 or _at_end(prepared):
        resume.save(session, prepared.trainer)
