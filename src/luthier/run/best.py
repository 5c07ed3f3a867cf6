"""Which evaluation of a run was the best: its weights are kept, and a run that gets no better ends early.

As `load_best_model_at_end` and `early_stopping_patience` of transformers. The last step is evaluated too, so
that the weights at the end are among those compared. Evaluations are read from the log, which a resumed run
cuts at its checkpoint: it decides as it would have without the kill.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import Damaged, RecipeError
from luthier.recipe.recipe import Recipe
from luthier.registry.metrics import metric as metric_of
from luthier.run.prepare import Prepared
from luthier.run.session import Session
from luthier.storage import checkpoints, files
from luthier.storage.layout import BEST, read_log

TENSORS = "tensors.safetensors"
STEP = "step.json"


def eval_interval(recipe: Recipe) -> float | None:
    """eval_steps; where evaluations are compared and none is set, as often as a checkpoint is written."""
    if recipe.eval_steps is None and recipe.compares_evaluations:
        return recipe.save_steps
    return recipe.eval_steps


def open_best(prepared: Prepared) -> Best | None:
    """The evaluations of a run so far; None where it does not compare them."""
    recipe = prepared.session.recipe
    if not recipe.compares_evaluations:
        return None
    best = Best(prepared)
    for step, value in evaluations(prepared.session, best.metric):
        best.note(step, value)
    best.stop_if_exhausted()
    return best


def evaluations(session: Session, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in the log, which only the main process writes."""
    values = []
    if session.main:
        for line in read_log(session.folder):
            if f"eval_{metric}" in line:
                values.append((line["step"], line[f"eval_{metric}"]))
    return session.processes.broadcast(values)


@dataclass
class Best:
    """The best evaluation so far, and for how many later ones it has been."""

    prepared: Prepared
    step: int | None = None
    value: float = math.nan
    waited: int = 0  # evaluations since the last one that was better

    @property
    def metric(self) -> str:
        return self.prepared.session.recipe.best_metric

    def is_better(self, value: float) -> bool:
        """Whether a value is better than the best one by more than the threshold."""
        if math.isnan(value):
            return False
        if self.step is None or math.isnan(self.value):
            return True
        gain = value - self.value if metric_of(self.metric).higher_is_better else self.value - value
        return gain > self.prepared.session.recipe.early_stopping_threshold

    def note(self, step: int, value: float) -> bool:
        """One more evaluation; whether it is the best."""
        better = self.is_better(value)
        if better:
            self.step, self.value, self.waited = step, value, 0
        else:
            self.waited += 1
        return better

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """The evaluation of this step: its weights are kept where they are the best, and where it was one too
        many the run ends. Raises RecipeError where the metric is not measured.
        """
        session = self.prepared.session
        if self.metric not in metrics:
            raise RecipeError(
                f"metric_for_best_model: {self.metric} is not measured during training (measured:"
                f" {', '.join(metrics) or 'nothing'})"
            )
        if self.note(step, metrics[self.metric]) and session.recipe.load_best_model_at_end and session.main:
            save_best(self.prepared, step)
        self.stop_if_exhausted()

    def stop_if_exhausted(self) -> None:
        """Let the run end at this step where patience is at its end."""
        session, clock = self.prepared.session, self.prepared.trainer.roles.clock
        patience = session.recipe.early_stopping_patience
        if patience is None or self.waited < patience or clock.step >= clock.total:
            return
        session.warn(
            f"stopped early at step {clock.step} of {clock.total}: {self.metric} was best at step"
            f" {self.step} ({self.value:.4g}), and not better in the {self.waited} evaluations since"
        )
        clock.total = clock.step


def save_best(prepared: Prepared, step: int) -> None:
    """The weights of this step, beside the checkpoints."""
    folder = prepared.session.folder / BEST
    with files.disk_errors(prepared.session.folder):
        with files.new_folder(folder) as beside:
            checkpoints.save_tensors(prepared.trainer.roles.tuner.state(), beside / TENSORS)
            files.write_json(beside / STEP, {"step": step})


def load_best(prepared: Prepared) -> None:
    """At the end of a run: the weights of its best evaluation. Raises Damaged where they are not there."""
    session, roles = prepared.session, prepared.trainer.roles
    best = open_best(prepared)
    if best is None or not session.recipe.load_best_model_at_end or best.step is None:
        return
    folder = session.folder / BEST
    if best.step != roles.clock.step:
        step = files.read_object(folder / STEP, step=int)["step"]
        if step != best.step:
            raise Damaged(f"{folder} holds the weights of step {step}, not of step {best.step}, the best one")
        roles.tuner.load(checkpoints.load_tensors(folder / TENSORS))
        _, last = evaluations(session, best.metric)[-1]
        session.warn(
            f"the weights of step {best.step} are used, where {best.metric} was best ({best.value:.4g};"
            f" {last:.4g} at step {roles.clock.step}, the last)"
        )


def forget_best(folder: Path) -> None:
    """The weights of the best evaluation are those of the finished run."""
    shutil.rmtree(folder / BEST, ignore_errors=True)
