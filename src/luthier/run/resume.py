"""Checkpoints of a run: saved so that the same command goes on from them, bit for bit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from luthier.errors import Damaged, RecipeError
from luthier.run.folder import truncate_log, update_state
from luthier.run.session import Session
from luthier.storage import checkpoints, files, manifest
from luthier.storage.layout import BEFORE, LOG, ROWS, STATE, constant_files
from luthier.train.trainer import Totals, Trainer, joined_shares, share


def starting_point(session: Session) -> Path | None:
    """The checkpoint that a run goes on from; None where it begins. One that is damaged is said and left
    aside; so is what the run made before its first step, and can make again. Raises RecipeError where
    processes do not see the same folder.
    """
    folder = session.folder
    checkpoint = checkpoints.newest_intact(folder, session.warn)
    _check_same_disk(session, checkpoint)
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


def _check_same_disk(session: Session, checkpoint: Path | None) -> None:
    """Every process reads what the first one writes."""
    view = "no run"
    if (session.folder / STATE).is_file():
        view = checkpoint.name if checkpoint else "no checkpoint"
    views = session.processes.gather(view)
    for rank, other in enumerate(views):
        if other != views[0]:
            raise RecipeError(
                f"{session.folder} is not the same for all processes: rank 0 finds {views[0]} there and rank"
                f" {rank} finds {other}; set output_dir to a folder on a disk that all machines share (if"
                " they do, its changes were late: run the same command again)",
                "disk",
            )


def evaluate_start(
    session: Session, trainer: Trainer, rows: list[dict], checkpoint: Path | None
) -> dict[str, float]:
    """Metrics before training: measured once, then read back."""
    path = session.folder / BEFORE
    if session.processes.broadcast(checkpoint is not None and path.is_file()):
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
        processes, micro = session.processes, trainer.batches.micro
        if moment.draw is not None:
            trainer.drawn_rows = share(moment.draw, micro, processes.index, processes.count)
        for rows in moment.waiting:
            trainer.waiting.append(share(rows, micro, processes.index, processes.count))
        trainer.totals = Totals(**moment.totals)
        session.warn(f"resuming from {checkpoint.name} (of {clock.total} steps)")
    if session.main:
        lost = truncate_log(session.folder / LOG, clock.step)
        if lost:
            session.warn(
                f"{lost} lines of {LOG} are damaged; the losses of those steps are not in the report"
            )


def take_over(session: Session, trainer: Trainer) -> None:
    """What the estimator of an earlier run has left for those that start from it, where this run does."""
    entry, start = session.methods.estimator.persistent, session.recipe.init_from
    if not entry or not isinstance(start, str):
        return
    moment = checkpoints.load_newest(Path(start))
    state = {} if moment is None else moment.state
    former = {group: {entry: of_group[entry]} for group, of_group in state.items() if entry in of_group}
    if not former:
        session.warn(
            f"estimator '{trainer.estimator.name}': {start} was trained without it, so nothing says what to"
            " hold there; this run is plain backprop"
        )
    trainer.chain.load(former)


def save(session: Session, trainer: Trainer) -> None:
    """A checkpoint of this step. Every process comes here; the main one writes it."""
    clock = trainer.roles.clock
    # rows of the current draw are needed where the next step still trains on them
    draw = None
    if clock.step % trainer.batches.num_iterations:
        draw = joined_shares(session.processes.gather(trainer.drawn_rows or []), trainer.batches.micro)
    waiting = []
    for rows in trainer.waiting:
        waiting.append(joined_shares(session.processes.gather(rows), trainer.batches.micro))
    if not session.main:
        return
    if marks := session.base.finish():
        update_state(session.folder, base=marks)
    moment = checkpoints.Checkpoint(
        trainer.roles.tuner.state(), trainer.chain.state, clock.step, draw, asdict(trainer.totals), waiting
    )
    checkpoints.save(session.folder, moment, session.recipe.save_total_limit, constant_files(session.folder))
