"""Intrinsic dimension of a task (d90): the smallest d with which tuner `intrinsic_dimension` reaches a share
of full fine-tuning's metric.

The first d whose metric reaches `share` of full fine-tuning's is the answer; its run is the plan's result,
and its recipe has d. If none does, the result is the largest d. The recipe's learning rate is for full
fine-tuning; for each d the best of `learning_rates` counts. With `models` the search is made for each of
them, smallest first, and the report has a table of d90 by model: the paper finds that larger pretrained
models need fewer dimensions.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.plans._base import Plan, measured
from luthier.registry import plan


@plan(
    paper="arXiv:2012.13255",
    row="intrinsic-dimension",
    former_settings={"said": "structure_aware"},
    use_when="you ask how many free parameters your task takes, or how that changes with the model's size.",
    costs="one run for each dimension and each learning rate, and one of full fine-tuning; all of these for"
    " each model.",
    covers="a lower target has no larger d90; each model is searched by itself, and the report lists d90"
    " by size.",
    omits="that the larger of two pretrained models has no larger d90: it is not shown here."
    " d90 by pretraining step: name checkpoints under `models`. The bound on generalization.",
    tests=[
        "methods/tuners/low_rank/test_intrinsic_dimension.py::test_the_search_for_d90_stops_where_the_metric_is_reached",
        "methods/tuners/low_rank/test_intrinsic_dimension.py::test_d90_by_model",
    ],
)
class IntrinsicDimension(Plan):
    """The smallest d that is nearly as good as full fine-tuning."""

    # values of d, in ascending order
    dimensions: Annotated[tuple[int, ...], Field(min_length=1)] = (100, 200, 400, 800, 1600, 3200)
    # learning rates that are tried for each d
    learning_rates: Annotated[tuple[float, ...], Field(min_length=1)] = (0.03, 0.1, 0.3)
    share: Annotated[float, Field(gt=0, le=1)] = 0.9  # share of full fine-tuning's metric to reach
    metric: str = "accuracy"  # metric that counts; higher is better
    structure_aware: bool = True  # a separate scale for each module
    models: tuple[str, ...] = ()  # models to search one after another; empty: the recipe's

    def recipes(self, recipe):
        table: list[dict[str, Any]] = []
        best = None
        for model in self.models or (None,):
            one = recipe if model is None else recipe.but(model=model)
            full = yield one.but(tuner="full")
            goal = self.share * measured(full, self.metric)
            best, d, reached = full, 0, False
            for d in sorted(self.dimensions):
                tuner = {"name": "intrinsic_dimension", "d": d, "structure_aware": self.structure_aware}
                runs = yield [one.but(tuner=tuner, learning_rate=rate) for rate in self.learning_rates]
                best = max(runs, key=lambda run: measured(run, self.metric))
                reached = measured(best, self.metric) >= goal
                if reached:
                    break
            table.append(
                {
                    "model": model or str(recipe.model),
                    "parameters": full.stats.get("moving"),
                    "d90": d if reached else f"over {d}",
                    self.metric: measured(best, self.metric),
                    f"{self.metric} (full)": measured(full, self.metric),
                }
            )
        if best is not None:
            best.stats["table"] = table
        return best
