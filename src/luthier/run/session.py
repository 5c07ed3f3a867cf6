"""A run that has its folder, its rows and its processes: what every stage of it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from luthier.data.checks import unused_columns
from luthier.data.load import ENOUGH, Data, load_data
from luthier.data.quarantine import write_quarantine
from luthier.errors import RecipeError, from_code, outcome_of
from luthier.methods.evaluators._base import read, run_all
from luthier.model.base_mark import BaseMark
from luthier.model.load import device, pick_dtype
from luthier.model.policy import Roles
from luthier.processes import group, launcher
from luthier.processes.group import Processes
from luthier.processes.lifeline import Fault, describe
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import Methods, check_trackers, dry_run
from luthier.report.console import Callback
from luthier.report.status import StatusFile
from luthier.run.folder import as_begun, leave_failure, open_folder, rows_fingerprint
from luthier.run.report import Report
from luthier.storage import files
from luthier.storage.bounded_yaml import load_yaml
from luthier.storage.layout import QUARANTINE, STATE
from luthier.version import __version__

FEW_HELD_OUT = 4  # with fewer, a run says that its metrics are rough


@dataclass(frozen=True)
class Session:
    """A run in its folder. Only the main process writes there, and only its callback is the user's."""

    recipe: Recipe
    methods: Methods
    data: Data
    folder: Path
    callback: Any  # report.console.Callback or alike
    processes: Processes
    accelerator: Any  # its trackers
    stop_at: float | None = None  # pause at this step; below 1 a share of the run
    lock: files.FolderLock | None = None  # of the folder, in the main process
    base: BaseMark = field(default_factory=BaseMark)  # of the model that is tuned
    first_note: int = 0  # of this run among those of the callback, which may hear several runs of a plan

    @property
    def main(self) -> bool:
        return self.processes.main

    def warn(self, sentence: str) -> None:
        self.callback.warn(sentence)

    @property
    def notes(self) -> list[str]:
        """The warnings of this run."""
        return list(self.callback.notes[self.first_note :])

    def check_folder(self) -> None:
        """Raises RecipeError where the folder was removed, or was taken by another run."""
        if self.lock is not None:
            self.lock.check()

    def has_folder(self) -> bool:
        """Whether the folder is still this run's."""
        try:
            self.check_folder()
        except RecipeError:
            return False
        return True

    @torch.no_grad()
    def evaluate(self, roles: Roles, rows: list[dict], when: str) -> dict[str, float]:
        """Metrics by name. when: before, during or after training.

        Every process measures all rows, so none waits long for another; the main one's numbers count.
        """
        roles.policy.eval()
        with self.working(roles, f"evaluating {when} training"):
            metrics = run_all(self.methods.evaluate, roles, rows, self.folder, when)
        metrics = self.processes.broadcast(metrics)
        self.accelerator.log({f"eval_{k}": v for k, v in metrics.items()}, step=roles.clock.step)
        return metrics

    @torch.no_grad()
    def loss(self, roles: Roles, rows: list[dict]) -> float:
        """The mean loss of a supervised token on some rows, as the evaluator `loss` measures it."""
        roles.policy.eval()
        stats = read(roles, rows, None, {"loss"}).values()
        total = sum(s.loss for s in stats) / max(1, sum(s.tokens for s in stats))
        return self.processes.broadcast(total)

    @contextmanager
    def working(self, roles: Roles, name: str) -> Iterator[None]:
        """Around a long piece of work: the callback hears how much of it is done."""
        silent = roles.policy.progress
        with self.callback.working(name) as progress:
            roles.policy.progress = progress
            try:
                yield
            finally:
                roles.policy.progress = silent


def step_count(steps: float | None, total: int) -> int:
    """A setting such as save_steps as a number of steps; below 1 it is a share of the run, 0 is never."""
    if not steps:
        return 0
    if steps < 1:
        steps = round(steps * total)
    return max(1, int(steps))


@contextmanager
def open_session(
    recipe: Recipe,
    folder: Path,
    callback: Any = None,
    overwrite: bool = False,
    stop_at: float | None = None,
) -> Iterator[Session | Report]:
    """A run in its folder, for as long as it lasts; of a finished one its report.

    Whatever a run fails of is left there as failed.json. Raises RecipeError, OutOfMemory among others.
    """
    from accelerate.utils import set_seed

    check_trackers(recipe.report_to)
    recipe = as_begun(folder, recipe)
    processes = group.join()
    main = processes.main
    launcher.check_settings(
        str(pick_dtype(recipe.dtype, device())).removeprefix("torch."),
        recipe.gradient_accumulation_steps,
        recipe.torch_compile,
    )
    accelerator = _accelerator(recipe, folder)
    if callback is None or not main:
        callback = Callback()
    first_note = len(callback.notes)
    for sentence in recipe.warnings:
        callback.warn(sentence)
    data = _load_data(recipe, folder, main)
    for sentence in data.notes:
        callback.warn(sentence)
    if sentence := unused_columns(data):
        callback.warn(sentence)
    methods = dry_run(recipe, data.rows[:100])
    _check_same_run(processes, recipe, data)
    with open_folder(folder, recipe, data, main, overwrite) as state:
        for sentence in state.warnings:
            callback.warn(sentence)
        if processes.broadcast(state.finished):
            callback.warn(
                f"{folder} already holds this run, finished; nothing to do (overwrite=true starts over)"
            )
            yield Report.read(folder)
            return
        if main:
            callback = StatusFile(callback, folder)
        if state.version != __version__:
            callback.warn(
                f"this run was started by luthier {state.version} and is resumed by"
                f" {__version__}: its results may match neither version"
            )
        session = Session(
            recipe,
            methods,
            data,
            folder,
            callback,
            processes,
            accelerator,
            stop_at,
            state.lock,
            first_note=first_note,
        )
        _quarantine(session)
        set_seed(recipe.seed)
        _start_trackers(session)
        try:
            with processes.watching(lambda fault: _write_fault(session, fault)):
                yield session
        except Exception as error:
            outcome = processes.agree(outcome_of(error))
            if session.has_folder():
                leave_failure(processes, folder, outcome)
            processes.wait_before_leaving()
            if outcome is error:
                raise
            raise outcome from None
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()


def _check_same_run(processes: Processes, recipe: Recipe, data: Data) -> None:
    """Raises RecipeError where processes would train with other settings, or on other rows."""
    runs = processes.gather((recipe.fingerprint(), data.fingerprint))
    for rank, (settings, rows) in enumerate(runs):
        if settings != runs[0][0]:
            raise RecipeError(f"rank {rank} has another recipe than rank 0: all processes need the same")
        if rows != runs[0][1]:
            raise RecipeError(
                f"rank {rank} reads other rows than rank 0: data and eval_data must hold the same for all"
                " processes"
            )


def _write_fault(session: Session, fault: Fault) -> None:
    """Write down what another process failed of, where this one is ended in the middle of something."""
    processes = session.processes
    message = describe(fault, processes.index, processes.count)
    if session.has_folder():
        leave_failure(processes, session.folder, from_code(fault.code, message))


def _accelerator(recipe: Recipe, folder: Path) -> Any:
    from accelerate import Accelerator

    return Accelerator(
        cpu=not torch.cuda.is_available(), log_with=[*recipe.report_to] or None, project_dir=str(folder)
    )


def _load_data(recipe: Recipe, folder: Path, main: bool) -> Data:
    """The rows of a run. In a folder without a run the unusable ones are listed even if all are refused."""
    quarantine = folder / QUARANTINE
    new = main and not (folder / STATE).exists()
    files.check_folder_name(folder)
    with files.disk_errors(folder):
        if new:
            quarantine.unlink(missing_ok=True)  # of an earlier attempt, which was refused
        return load_data(recipe, quarantine if new else None, rows_fingerprint(folder))


def _quarantine(session: Session) -> None:
    """List the unusable rows with their reasons, and say how many there are; and how many are held out."""
    data, path = session.data, session.folder / QUARANTINE
    if session.main:
        with files.disk_errors(session.folder):
            path.unlink(missing_ok=True)
            write_quarantine(data.bad, path)
    if data.bad:
        total = len(data.bad) + len(data.rows) + len(data.held_out)
        session.warn(
            f"{len(data.bad):,} of {total:,} rows cannot be used and are listed with reasons in {path}"
        )
    _warn_few_held_out(session)


def _warn_few_held_out(session: Session) -> None:
    """Say where metrics are measured on rows that are also learned, or on very few."""
    rows, held_out, share = len(session.data.rows), len(session.data.held_out), session.recipe.eval_data
    if not rows or not session.methods.evaluate:
        return
    if held_out:
        if held_out < FEW_HELD_OUT:
            only = "only 1 row is" if held_out == 1 else f"only {held_out} rows are"
            session.warn(f"{only} held out: metrics on so few rows are rough (eval_data: a share, or a file)")
        return
    reason = ""
    if rows < ENOUGH and share == "auto":
        reason = f": {rows:,} rows are too few (eval_data: 0.2 holds out a fifth nevertheless)"
    elif share:
        reason = f": {share} of {rows:,} rows is less than one row"
        if rows >= ENOUGH:
            reason = ": all rows have the same prompt, which must not be on both sides"
    session.warn(f"no rows are held out{reason}; metrics are measured on training rows")


def _start_trackers(session: Session) -> None:
    """Trackers receive the whole recipe but for rows given from Python."""
    if not session.recipe.report_to:
        return
    settings = {}
    for key, value in load_yaml(session.recipe.yaml()).items():
        if isinstance(value, (int, float, str)):
            settings[key] = value
        elif not (isinstance(value, list) and key in ("data", "eval_data")):
            settings[key] = json.dumps(value)
    session.accelerator.init_trackers("luthier", settings)
