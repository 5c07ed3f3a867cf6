"""Checkpoints of a run: saved so that the same command goes on from them, bit for bit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from luthier.run.folder import truncate_log
from luthier.run.session import Session
from luthier.storage import checkpoints, files
from luthier.storage.layout import BEFORE, LOG
from luthier.train.trainer import Totals, Trainer


def latest_checkpoint(folder: Path) -> Path | None:
    paths = checkpoints.paths(folder)
    return paths[-1] if paths else None


def evaluate_start(
    session: Session, trainer: Trainer, rows: list[dict], checkpoint: Path | None
) -> dict[str, float]:
    """Metrics before training: measured once, then read back."""
    path = session.folder / BEFORE
    if checkpoint is not None and path.is_file():
        return files.read_json(path)
    session.callback.stage("evaluating before training")
    metrics = session.evaluate(trainer.roles, rows, "before")
    if session.main:
        files.write_json(path, metrics)
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
        truncate_log(session.folder / LOG, clock.step)


def save(session: Session, trainer: Trainer) -> None:
    """A checkpoint of this step."""
    clock = trainer.roles.clock
    # rows of the current draw are needed where the next step still trains on them
    draw = trainer.drawn_rows if clock.step % trainer.batches.num_iterations else None
    moment = checkpoints.Checkpoint(
        trainer.roles.tuner.state(), trainer.chain.state, clock.step, draw, asdict(trainer.totals)
    )
    checkpoints.save(session.folder, moment, session.recipe.save_total_limit)
