"""Checkpoints of a run: saved so that the same command goes on from them, bit for bit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from luthier.errors import Damaged
from luthier.run.folder import truncate_log, update_state
from luthier.run.session import Session
from luthier.storage import checkpoints, files, manifest
from luthier.storage.layout import BEFORE, LOG, ROWS, constant_files
from luthier.train.trainer import Totals, Trainer


def starting_point(session: Session) -> Path | None:
    """The checkpoint that a run goes on from; None where it begins. One that is damaged is said and left
    aside; so is what the run made before its first step, and can make again.
    """
    folder = session.folder
    checkpoint = checkpoints.newest_intact(folder, session.warn)
    if checkpoint is None:
        return None
    for name in manifest.changed_run_files(checkpoint, folder):
        if name not in (BEFORE, ROWS):
            raise Damaged(
                f"{folder / name} is not what it was when {checkpoint.name} was saved; put it back, or set"
                " overwrite=true to start over"
            )
        session.warn(f"{folder / name} is missing or damaged, and is made again")
        if session.main:
            (folder / name).unlink(missing_ok=True)
    return checkpoint


def evaluate_start(
    session: Session, trainer: Trainer, rows: list[dict], checkpoint: Path | None
) -> dict[str, float]:
    """Metrics before training: measured once, then read back."""
    path = session.folder / BEFORE
    if checkpoint is not None and path.is_file():
        return read_metrics(path)
    metrics = session.evaluate(trainer.roles, rows, "before")
    if session.main:
        files.write_json(path, metrics)
    return metrics


def read_metrics(path: Path) -> dict[str, float]:
    """Metrics by name. Raises Damaged where a value is no number."""
    metrics = files.read_object(path)
    for name, value in metrics.items():
        if not isinstance(value, (int, float, type(None))):
            raise Damaged(f"{path} is damaged: {name} is not a number")
    return metrics


def resume(session: Session, trainer: Trainer, checkpoint: Path | None) -> None:
    """Go on from a checkpoint, if there is one; the log ends there."""
    clock = trainer.roles.clock
    if checkpoint is not None:
        moment = checkpoints.load(checkpoint)
        trainer.roles.tuner.load(moment.tensors)
        trainer.chain.load(moment.state)
        clock.step = clock.first = moment.step
        trainer.drawn_rows = moment.draw
        trainer.totals = Totals(**moment.totals)
        session.warn(f"resuming from {checkpoint.name} (of {clock.total} steps)")
    if session.main:
        lost = truncate_log(session.folder / LOG, clock.step)
        if lost:
            session.warn(
                f"{lost} lines of {LOG} are damaged; the losses of those steps are not in the report"
            )


def save(session: Session, trainer: Trainer) -> None:
    """A checkpoint of this step."""
    clock = trainer.roles.clock
    if marks := session.base.finish():
        update_state(session.folder, base=marks)
    # rows of the current draw are needed where the next step still trains on them
    draw = trainer.drawn_rows if clock.step % trainer.batches.num_iterations else None
    moment = checkpoints.Checkpoint(
        trainer.roles.tuner.state(), trainer.chain.state, clock.step, draw, asdict(trainer.totals)
    )
    checkpoints.save(session.folder, moment, session.recipe.save_total_limit, constant_files(session.folder))
