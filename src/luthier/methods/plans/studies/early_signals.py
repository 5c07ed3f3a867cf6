"""Which settings are worth training to the end? A grid of runs, and what the norm of their first gradients
says of it.

Each setting is a set of changes to the recipe, such as a batch size with a learning rate. Of every run the
means of gradient norm (before clipping) and loss over its first steps stand beside its score at the end,
with Spearman's rank correlation of each with the scores. In the paper's runs a low norm and a high loss early
on went with a good score at the end (Pareja et al., 2024). With `stop` that is a rule: every setting is
trained for the first steps, and of these the `share` with the lowest norm goes to the end.

With `phases` every setting is trained twice: `stacked`, on the rows of all phases at once, and `phased`, on
those of one phase after the other, each going on from the last. Both read the same rows equally often.

Departs: a setting that goes on begins again, so its first steps are computed twice; as the rate is constant,
they are the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.evaluators._trajectory import spearman
from luthier.methods.plans._base import Plan, measured
from luthier.registry import metric, plan
from luthier.storage.layout import read_log

EVERY = 10**9  # rows: all that there are


@dataclass(frozen=True)
class Early:
    """Means over the first steps of a run."""

    norm: float  # of the gradient
    loss: float  # of training


@plan(
    paper="arXiv:2412.13337",
    row="small-llm-sft-guide",
    use_when="you try batch sizes, learning rates, warm-up or schedules and would stop early what will not be"
    " the best.",
    costs="a run for each setting, two with `phases`; with `stop` the first steps of each, and a run for the"
    " share that goes on.",
    covers="any grid of settings, gradient norm and loss of the first steps and their rank correlation with"
    " the final score, the rule that stops runs of a high norm and the steps that it saves, phased and"
    " stacked training on the same rows.",
    omits="the paper's 3B to 7B models, its knowledge and skill data, MMLU, MT-Bench and the Open LLM"
    " Leaderboard; that large batches at low rates win is to be measured, not built in.",
    tests=[
        "methods/plans/studies/test_early_signals.py::test_the_norm_of_a_step_is_what_torch_clips_by",
        "methods/plans/studies/test_early_signals.py::test_phased_and_stacked_read_the_same_rows",
        "methods/plans/studies/test_early_signals.py::test_the_correlation_is_that_of_scipy",
        "methods/plans/studies/test_early_signals.py::test_the_rule_has_the_best_of_nine_runs_and_saves_steps",
    ],
)
class EarlySignals(Plan):
    """Runs of all settings. The best by the metric is the plan's result; its report has the table."""

    # name of a setting -> its changes to the recipe
    settings: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = field(
        default_factory=lambda: {"recipe": {}}
    )
    first_steps: Annotated[int, Field(ge=1)] = 30  # steps whose gradient norm and loss are averaged
    stop: bool = False  # train all for the first steps and only those of a low norm to the end
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the settings goes to the end, rounded down
    # values of the column, in this order, for phased beside stacked training
    phases: tuple[str, ...] = ()
    column: str = "source"  # column that says of which phase a row is
    metric: str = "loss"  # the score at the end

    def __post_init__(self):
        if len(set(self.phases)) < len(self.phases) or len(self.phases) == 1:
            raise RecipeError("plan 'early_signals': phases are two or more, each there once")
        if self.phases and self.stop:
            raise RecipeError("plan 'early_signals': phases are compared in full; leave out stop")

    def recipes(self, recipe):
        arms = {}
        for name, changes in self.settings.items():
            arms[name] = recipe.but(**{"logging_steps": 1, **changes})
        if self.phases:
            return (yield from self.with_phases(arms))
        chosen, early = arms, {}
        if self.stop:
            for name, arm in arms.items():
                self.check_constant(name, arm)
            probes = yield [arm.but(max_steps=self.first_steps_of(arm)) for arm in arms.values()]
            early = self.early(dict(zip(arms, probes, strict=True)))
            chosen = {name: arms[name] for name in lowest(early, self.share)}
        reports = yield list(chosen.values())
        runs = dict(zip(chosen, reports, strict=True))
        if not self.stop:
            early = self.early(runs)
        best = self.best(runs)
        best.stats["table"] = self.table(early, runs)
        if self.stop:
            best.stats["early_stop"] = saved = self.saved(arms, chosen)
            sentence = f"{len(arms) - len(chosen)} of {len(arms)} settings were stopped early"
            if saved is not None:
                sentence += f", which saved {saved:.0%} of all steps"
            best.notes.append(sentence)
        else:
            self.correlate(best, early, runs)
        return best

    def with_phases(self, arms: Mapping[str, Any]) -> Any:
        """Stacked runs of all settings and phased ones; returns the best report."""
        stacked = yield [self.on_rows(arm, self.phases) for arm in arms.values()]
        runs = {f"{name}, stacked": report for name, report in zip(arms, stacked, strict=True)}
        for name, arm in arms.items():
            report = None
            for phase in self.phases:
                run = self.on_rows(arm, [phase])
                report = yield run if report is None else run.but(init_from=report.folder)
            runs[f"{name}, phased"] = report
        best = self.best(runs)
        early = self.early({name: runs[f"{name}, stacked"] for name in arms})
        table = []
        for name in arms:
            scores = {how: self.score(runs[f"{name}, {how}"]) for how in ("stacked", "phased")}
            table.append({"setting": name, **scores, "added by phases": scores["phased"] - scores["stacked"]})
        best.stats["table"] = table
        self.correlate(best, early, {name: runs[f"{name}, stacked"] for name in arms})
        return best

    def on_rows(self, recipe: Any, phases: Sequence[str]) -> Any:
        """The recipe on all rows of some phases, and none of others."""
        quotas = {"name": "quotas", "column": self.column, "counts": dict.fromkeys(phases, EVERY), "cap": 0}
        return recipe.but(stages=[quotas, *(recipe.stages or ())])

    def check_constant(self, name: str, arm: Any) -> None:
        """Raises RecipeError where the first steps of a short run are not those of a long one."""
        if arm.lr_scheduler_type != "constant" or 0 < arm.warmup_steps < 1:
            raise RecipeError(
                f"plan 'early_signals': setting '{name}' has a rate that depends on the run's length; with"
                " stop the recipe needs `lr_scheduler_type: constant` and `warmup_steps` of 0 or whole steps"
            )

    def first_steps_of(self, arm: Any) -> int:
        """How long a setting is trained before it is judged."""
        return self.first_steps if arm.max_steps is None else min(self.first_steps, arm.max_steps)

    def early(self, runs: Mapping[str, Any]) -> dict[str, Early]:
        """The means over the first steps of each run."""
        return {name: early_of(report, self.first_steps) for name, report in runs.items()}

    def score(self, report: Any) -> float:
        return measured(report, self.metric)

    def best(self, runs: Mapping[str, Any]) -> Any:
        """The report with the best score; of equals the first."""
        choose = max if metric(self.metric).higher_is_better else min
        return choose(runs.values(), key=self.score)

    def table(self, early: Mapping[str, Early], runs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A line for each setting; None as the score of one that was stopped."""
        table = []
        for name, one in early.items():
            score = self.score(runs[name]) if name in runs else None
            norm = one.norm if math.isfinite(one.norm) else None
            loss = one.loss if math.isfinite(one.loss) else None
            line = {"setting": name, "early gradient norm": norm, "early loss": loss, self.metric: score}
            table.append(line)
        return table

    def saved(self, arms: Mapping[str, Any], chosen: Mapping[str, Any]) -> float | None:
        """The share of all settings' steps that was not computed; None where recipes count epochs."""
        if any(arm.max_steps is None for arm in arms.values()):
            return None
        whole = sum(arm.max_steps for arm in arms.values())
        computed = sum(self.first_steps_of(arm) for arm in arms.values())
        computed += sum(arm.max_steps for arm in chosen.values())
        return 1 - computed / whole if whole else 0.0

    def correlate(self, best: Any, early: Mapping[str, Early], runs: Mapping[str, Any]) -> None:
        """Puts the rank correlations of early means and final scores into a report."""
        if len(runs) < 3:
            return
        scores = [self.score(runs[name]) for name in early]
        best.stats["early_signals"] = numbers = {}
        for label in ("norm", "loss"):
            values = [getattr(one, label) for one in early.values()]
            numbers[label] = value = rank_correlation(values, scores)
            if value is not None:
                best.notes.append(f"early {label} and final {self.metric}: rank correlation {value:+.2f}")


def early_of(report: Any, steps: int) -> Early:
    """Means over the first steps of a run; nan where it logged none."""
    lines = [line for line in read_log(Path(report.folder)) if line["step"] <= steps]
    return Early(mean_of(lines, "gradient_norm"), mean_of(lines, "loss"))


def mean_of(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    """nan where a line does not have it."""
    values = [line.get(key, math.nan) for line in lines]
    return fmean(values) if values else math.nan


def lowest(early: Mapping[str, Early], share: float) -> list[str]:
    """The settings that go on, in their own order: those with the lowest norm, at least one. A norm that was
    not measured or is not finite counts as the highest.
    """
    norms = {name: one.norm if math.isfinite(one.norm) else math.inf for name, one in early.items()}
    count = max(1, int(share * len(norms)))
    first = set(sorted(norms, key=norms.__getitem__)[:count])
    return [name for name in norms if name in first]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's; None where a number is missing or one side is constant."""
    values = torch.tensor([*x, *y], dtype=torch.float64)
    if not values.isfinite().all():
        return None
    return spearman(values[: len(x)], values[len(x) :])
