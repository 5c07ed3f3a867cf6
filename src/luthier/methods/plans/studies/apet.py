"""Compares structures of tuning at equal numbers of trainable parameters, and searches how few suffice.

Two experiments of one study. `structures` names ways to tune, each a list of tuners with more and more
trainable parameters. At equal places of the lists these numbers should be equal, the structures alone differ,
and tuner `apet` (random positions) is one of them: the spread of their metrics says what structure matters.
Along a list only the number grows: the low threshold is the first that beats the untuned model by `margin`,
the high threshold the first that comes within `share` of full fine-tuning. With `models` both are measured
for each of them; the paper finds that the spread and the high threshold fall with the model's size.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan, measured
from luthier.registry import plan


@plan(
    row="apet",
    use_when="you study whether a tuner's structure matters beside its size.",
    costs="one run for each tuner of each structure, and one of full fine-tuning; all for each model.",
    covers="on a known curve the thresholds are its crossings; spread and thresholds are those of the "
    "runs, by model.",
    omits="the paper's finding itself, a spread that falls with the scale of T5 from 60M to 11B: it has"
    " not been shown on the two sizes of the toy models.",
    tests=[
        "methods/plans/studies/test_apet.py::test_thresholds_are_the_crossings_of_a_curve",
        "methods/plans/studies/test_apet.py::test_apet_compares_structures_by_model",
    ],
)
class APET(Plan):
    """Thresholds and spreads of several structures. The best run by the metric is the plan's result."""

    # structure -> its tuners, in ascending order of trainable parameters
    structures: dict[str, list[Any]]
    models: tuple[str, ...] = ()  # models to compare, smallest first; empty: the recipe's
    metric: str = "accuracy"  # metric that counts; higher is better
    margin: Annotated[float, Field(ge=0)] = 0.02  # what beats the untuned model, for the low threshold
    share: Annotated[float, Field(gt=0, le=1)] = 0.95  # of full fine-tuning, for the high threshold

    def __post_init__(self):
        if not self.structures or not all(self.structures.values()):
            raise RecipeError("structures: name at least one, each with at least one tuner")

    def recipes(self, recipe):
        table: list[dict[str, Any]] = []
        spreads: list[dict[str, Any]] = []
        every, unmeasured = [], []
        for model in self.models or (None,):
            one = recipe if model is None else recipe.but(model=model)
            full = yield one.but(tuner="full")
            every.append(full)
            untuned = full.before.get(self.metric)
            low = None if untuned is None else float(untuned) + self.margin
            high = self.share * measured(full, self.metric)
            values = {}
            for name, tuners in self.structures.items():
                runs = yield [one.but(tuner=tuner) for tuner in tuners]
                every += runs
                counts = [int(run.stats.get("moving") or 0) for run in runs]
                values[name] = [measured(run, self.metric) for run in runs]
                table.append(
                    {
                        "model": model or str(recipe.model),
                        "structure": name,
                        "trainable": counts,
                        self.metric: values[name],
                        "low threshold": crossing(counts, values[name], low),
                        "high threshold": crossing(counts, values[name], high),
                    }
                )
            if low is None:
                unmeasured.append(model or str(recipe.model))
            spreads += self.spread(model or str(recipe.model), values)
        best = max(every, key=lambda run: measured(run, self.metric))
        best.stats["table"], best.stats["spread"] = table, spreads
        for line in spreads:
            best.notes.append(
                f"{line['model']}, size {line['size']}: {len(self.structures)} structures lie"
                f" {line['range']:.3f} apart in {self.metric} (standard deviation {line['std']:.3f})"
            )
        for model in unmeasured:
            best.notes.append(
                f"{model}: {self.metric} was not measured before training, so there is no low threshold"
            )
        return best

    def spread(self, model: str, values: dict[str, list[float]]) -> list[dict[str, Any]]:
        """At each place that all structures have: how far apart their metrics are."""
        lines = []
        for place, some in enumerate(zip(*values.values(), strict=False)):
            lines.append(
                {
                    "model": model,
                    "size": place + 1,
                    "std": statistics.pstdev(some),
                    "range": max(some) - min(some),
                }
            )
        return lines


def crossing(counts: Sequence[int], values: Sequence[float], level: float | None) -> int | None:
    """The first of ascending counts whose value reaches a level; None where none does, or without a level."""
    if level is None:
        return None
    for count, value in zip(counts, values, strict=True):
        if value >= level:
            return count
    return None
