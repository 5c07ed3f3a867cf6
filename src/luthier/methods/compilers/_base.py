"""The kind's protocol: tunes a program. From rows and a metric to the same program with other demonstrations,
instructions or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.registry import family

if TYPE_CHECKING:
    from luthier.programs.program import Asking, Metric, Program

Row = Mapping[str, Any]


@family
class Compiler:
    """Family: `compile` returns a tuned copy; the given program is not changed."""

    def compile(
        self, program: Program, rows: Sequence[Row], metric: Metric, teacher: Program | None = None
    ) -> Program:
        """rows: columns that the program reads and the metric looks at. teacher: who shows how, if not the
        program itself.
        """
        raise NotImplementedError

    def tune(self, recipe: Mapping[str, Any], folder: Any) -> Any:
        """Fine-tune a model on the way, as `luthier.tune` does; it is reached by name, as runs lie above
        methods.
        """
        return import_module("luthier").tune(recipe, folder=folder)


def drawn(n: int, clock: Clock, *names: object) -> list[int]:
    """0 ... n - 1 in an order that follows from the clock and the names."""
    return torch.randperm(n, generator=clock.rng(*names)).tolist()


def ready(program: Program, rows: Sequence[Row]) -> None:
    """Refuses what cannot be compiled: nothing to ask, nobody to ask, nothing to ask about."""
    predictors = program.predictors()
    if not predictors:
        raise RecipeError(f"{type(program).__name__} has no predictors, so there is nothing to tune")
    if silent := [n for n, p in predictors.items() if p.lm is None]:
        raise RecipeError(
            f"predictor '{silent[0]}' has no model; set one: `program = program.using('toy:lm')`"
        )
    if not rows:
        raise RecipeError("compiling needs at least one row")
    program.reads(rows[0])


def accepted(
    teacher: Program,
    row: Row,
    metric: Metric,
    threshold: float,
    rounds: int,
    temperature: float,
    seed: int = 0,
) -> list[Asking] | None:
    """The questions and answers of the first try that the metric accepts: one without chance, then some with.
    None where none is.
    """
    for turn in range(rounds):
        prediction, trace = teacher.run(
            row, temperature if turn else 0.0, Clock(seed).derive_seed("try", turn)
        )
        if float(metric(row, prediction)) >= threshold:
            return trace
    return None


def matching(program: Program, teacher: Program) -> None:
    """A teacher's traces serve a program with predictors of the same names and signatures."""
    mine, theirs = program.predictors(), teacher.predictors()
    fields = [(n, p.signature.inputs, p.signature.outputs) for n, p in mine.items()]
    if fields != [(n, p.signature.inputs, p.signature.outputs) for n, p in theirs.items()]:
        raise RecipeError(
            f"the teacher is a different program: its predictors are {', '.join(theirs)}, not"
            f" {', '.join(mine)}"
        )
