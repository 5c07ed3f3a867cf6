"""What soups share: one run for each set of changes, and the metric that decides which average is better."""

from __future__ import annotations

from typing import Any

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan, measured
from luthier.registry import family


@family
class Soup(Plan):
    """Family: each run is a set of changes to the recipe, such as {learning_rate: 1e-4}; only averages are
    merged.
    """

    of: list[dict[str, Any]]  # changes to the recipe, one set per run
    metric: str = "loss"  # metric on held-out rows that decides
    greater_is_better: bool = False  # whether a higher metric is better

    def __post_init__(self):
        if len(self.of) < 2:
            raise ValueError(f"of: {self.name} needs at least two runs")

    def runs(self, recipe: Any) -> list[Any]:
        """The recipes of the ingredients. Raises RecipeError where seeds of their own would hold out other
        rows.
        """
        by_chance = recipe.eval_data == "auto" or isinstance(recipe.eval_data, (int, float))
        if by_chance and any("seed" in changes for changes in self.of):
            raise RecipeError(
                f"plan '{self.name}': with other seeds, other rows would be held out; set eval_data to a file"
            )
        return [recipe.but(**changes) for changes in self.of]

    def cost(self, report: Any) -> float:
        """The metric of a run, lower being better."""
        value = measured(report, self.metric)
        return -value if self.greater_is_better else value
