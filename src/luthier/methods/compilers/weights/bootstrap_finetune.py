"""BootstrapFinetune: turns the accepted traces of a teacher program into rows, one file per predictor, and
fine-tunes a small model on each.

The tuned models replace the predictors' models and need no demonstrations. Rows are `prompt`, as the
predictor writes it without demonstrations, and `completion`. A predictor that is in no accepted trace keeps
its model.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.compilers._base import Compiler, accepted, matching, ready
from luthier.programs.models import Local
from luthier.registry import compiler
from luthier.storage import files


@compiler(
    paper="arXiv:2310.03714",
    row="dspy-compile",
    use_when="a prompted program works with a large model and should run on a small tuned one.",
    costs="a run of the teacher program on the rows, and a fine-tuning run for each predictor.",
)
class BootstrapFinetune(Compiler):
    """Fine-tunes a small model on accepted traces."""

    output_dir: str  # folder for the rows and the runs: PREDICTOR.jsonl and PREDICTOR/
    # keys of the recipe of each fine-tuning run: model, tuner, learning_rate, ...
    recipe: dict[str, Any] = field(default_factory=dict)
    max_rounds: Annotated[int, Field(ge=1)] = 1  # attempts per row, the first greedy
    threshold: float = 1.0  # lowest metric of an accepted answer
    temperature: Annotated[float, Field(ge=0)] = 0.7  # sampling temperature of the attempts after the first
    seed: int = 0  # random seed of the attempts

    def __post_init__(self):
        if "data" in self.recipe:
            raise ValueError("recipe: leave data out; the training rows are those of the traces")

    def compile(self, program, rows, metric, teacher=None):
        teacher = teacher or program
        ready(teacher, rows)
        matching(program, teacher)
        clock, compiled, folder = Clock(self.seed), program.copy(), Path(self.output_dir)
        predictors = compiled.predictors()
        learned: dict[str, list[dict]] = {name: [] for name in predictors}
        for i, row in enumerate(rows):
            for step in (
                accepted(
                    teacher,
                    row,
                    metric,
                    self.threshold,
                    self.max_rounds,
                    self.temperature,
                    clock.derive_seed("row", i),
                )
                or ()
            ):
                signature = predictors[step.predictor].signature
                learned[step.predictor].append(
                    {
                        "prompt": signature.prompt(step.inputs),
                        "completion": signature.completion(step.outputs),
                    }
                )
        if not any(learned.values()):
            raise RecipeError(
                f"the metric accepts none of the {len(rows)} rows, so there is nothing to train"
                " on; use a better teacher, or more max_rounds"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name, some in learned.items():
            if some:
                file = folder / f"{name}.jsonl"
                files.write_rows(file, some)
                report = self.tune({"eval_data": 0, **self.recipe, "data": str(file)}, folder=folder / name)
                predictors[name].lm, predictors[name].demos = Local(report.folder), []
        compiled.compiled = {"rows": {name: len(some) for name, some in learned.items()}}
        return compiled
