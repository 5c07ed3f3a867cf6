"""All that comes after the last step: the evaluation after training, what a user takes away, and the page.
Or, of a run that pauses, what it measured on the way.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from luthier.model.saved import plain_configs
from luthier.registry import spec
from luthier.report.changes import measured_changes
from luthier.report.numbers import HELD_OUT, TRAINING_ROWS
from luthier.report.retention import read_skills, refusal_warning
from luthier.run import resume
from luthier.run.best import forget_best
from luthier.run.caches import close_caches
from luthier.run.folder import update_state
from luthier.run.prepare import Prepared
from luthier.run.report import Report
from luthier.run.rows import row_counts
from luthier.run.training import Trained, fits_likelihood, trend_rows
from luthier.storage import checkpoints, files
from luthier.storage.layout import PAUSED, read_log
from luthier.train.divergence import diverged, sentence
from luthier.train.samples import equal_steps
from luthier.train.trend import held_out_trend, logged_trend
from luthier.train.trend import sentence as sentence_of_trend


@dataclass(frozen=True)
class Finished:
    """A run that has ended, or that has paused."""

    report: Report
    paused: bool


def finish(trained: Trained) -> Finished:
    """Measured and saved, so that nothing of the run is needed in memory any more."""
    if not trained.complete:
        return Finished(_pause(trained.prepared), paused=True)
    # how pages are drawn is loaded only here: no run waits for it at its start
    from luthier.report.page import write_report

    prepared = trained.prepared
    session, trainer = prepared.session, prepared.trainer
    after = session.evaluate(trainer.roles, prepared.eval_rows, "after")
    log = read_log(session.folder)
    losses = [line["loss"] for line in log if "loss" in line]
    if ends := diverged(losses):
        session.warn(sentence(*ends))
    if equal := equal_steps(log):
        session.warn(equal)
    if lowered := refusal_warning([*read_skills(session.folder), *measured_changes(session.folder)]):
        session.warn(lowered)
    stats = _stats(prepared)
    if text := _trend(prepared, after, log):
        stats["trend"] = text
    close_caches(trainer, prepared.shared)
    report = Report(str(session.folder), prepared.before, after, losses, stats, notes=session.notes)
    session.check_folder()
    _save_checkpoint(prepared)
    if session.main:
        _save(prepared)
        write_report(session.recipe, report, log, session.folder)
        report.write(session.folder)
        update_state(session.folder, finished=True)
        forget_best(session.folder)
    session.processes.wait_for_all()
    return Finished(report, paused=False)


def _trend(prepared: Prepared, after: Mapping[str, float], log: Sequence[Mapping[str, Any]]) -> str:
    """Whether the run ended too early or too late, from what was measured on the way; empty where too little
    was.
    """
    session, trainer = prepared.session, prepared.trainer
    steps = trainer.roles.clock.total
    if not steps or session.recipe.compares_evaluations:  # the best evaluation is told already
        return ""
    higher_is_better = False
    what, measured = "training loss", None
    if fits_likelihood(session):
        points = [(line["step"], line["eval_loss"]) for line in log if "eval_loss" in line]
        rows = trend_rows(prepared)
        last = after.get("loss")
        if points and len(rows) < len(prepared.held_out):
            last = session.loss(trainer.roles, rows)
        if points and last is not None:
            what, measured = "held-out loss", held_out_trend([*points, (steps, last)])
    if measured is None and any("reward" in line for line in log):
        what, higher_is_better = "reward", True
        measured = logged_trend([line["reward"] for line in log if "reward" in line])
    elif measured is None:
        measured = logged_trend([line["loss"] for line in log if "loss" in line])
    if measured is None:
        return ""
    key, length = "max_steps", float(steps)
    if prepared.length.epochs is not None:
        key, length = "num_train_epochs", prepared.length.epochs
    return sentence_of_trend(measured, what, key, length, steps, higher_is_better)


def _pause(prepared: Prepared) -> Report:
    """Stop here for now: measured, and saved so that the same command goes on."""
    session, trainer = prepared.session, prepared.trainer
    clock, totals = trainer.roles.clock, trainer.totals
    metrics = session.evaluate(trainer.roles, prepared.eval_rows, "during")
    session.check_folder()
    resume.save(session, trainer)
    if session.main:
        stats = {
            "moving": prepared.stats["moving"],
            "seconds": totals.seconds,
            "tokens": totals.tokens,
            "peak_memory_mb": _peak_memory(),
        }
        moment = {"step": clock.step, "steps": clock.total, "metrics": metrics, "stats": stats}
        files.write_json(session.folder / PAUSED, moment)
    session.warn(
        f"paused at step {clock.step} of {clock.total}; run the same command without --stop-at to resume"
    )
    stats = {"paused_at": clock.step, "steps": clock.total}
    return Report(str(session.folder), prepared.before, metrics, stats=stats)


def _stats(prepared: Prepared) -> dict[str, Any]:
    """The numbers of a run beside its metrics: what it read, took and is."""
    session, trainer = prepared.session, prepared.trainer
    roles, rows, totals = trainer.roles, trainer.rows, trainer.totals
    architecture = roles.policy.architecture
    prompts = [row["prompt"] for row in rows]
    lines = bool(prompts) and all(isinstance(p, str) and p.endswith("\n") for p in prompts)
    return {
        **prepared.stats,
        **asdict(totals),
        "steps": roles.clock.total,
        "data_rows": len(rows),
        "row_counts": row_counts(session),
        "bad_rows": len(session.data.bad) + prepared.stats["unusable"],
        "held_out_rows": len(prepared.held_out),
        "evaluated_rows": len(prepared.eval_rows),
        "measured_on": HELD_OUT if prepared.held_out else TRAINING_ROWS,
        "turns": _on_turns(prepared),
        "ends": "\n" if lines else "",
        "writes": "generate" in architecture.provides,
        "auto_class": architecture.auto_class().__name__,
        "tokens_per_second": totals.tokens / max(totals.seconds, 1e-9),
        "peak_memory_mb": None if prepared.shared else _peak_memory(),  # side by side it is nobody's own
        "processes": session.processes.count,
        "rows_per_step": trainer.batches.per_step,
        "device": str(roles.device),
        "dtype": str(next(roles.policy.model.parameters()).dtype).removeprefix("torch."),
    }


def _on_turns(prepared: Prepared) -> bool:
    """Whether it was tuned on conversations."""
    rows = prepared.trainer.rows
    return bool(rows) and isinstance(rows[0]["prompt"], list)


def _save_checkpoint(prepared: Prepared) -> None:
    """A checkpoint of the last step, where training has not left one."""
    session, trainer = prepared.session, prepared.trainer
    total = trainer.roles.clock.total
    needed = session.main and (bool(total) or session.recipe.init_from is not None)
    latest = checkpoints.paths(session.folder)[-1:]
    if needed and latest:
        needed = checkpoints.read_meta(latest[0])["step"] != total
    if session.processes.broadcast(needed):
        resume.save(session, trainer)


def _save(prepared: Prepared) -> None:
    """What was trained, with the tokenizer, at the root of the folder."""
    session, trainer = prepared.session, prepared.trainer
    folder, roles = session.folder, trainer.roles
    checkpoints.prune(folder, session.recipe.save_total_limit)  # a kill may have come before it
    session.callback.stage("saving")
    with files.disk_errors(folder):
        roles.tuner.save(folder)
        roles.renderer.save(folder)
        if session.methods.quantizer is not None:
            files.write_json(folder / files.QUANTIZATION, spec(session.methods.quantizer))
        stop = []
        if _on_turns(prepared) and "generate" in roles.policy.architecture.provides:
            stop = roles.renderer.stop_ids
        plain_configs(session.recipe.model, folder, stop)
        files.settle(folder)


def _peak_memory() -> float:
    """Megabytes at most so far: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
