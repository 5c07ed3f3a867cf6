"""The kind's protocol: several runs as one. A plan is a generator that yields recipes and receives reports.

Its only state is the reports of finished runs, so a stopped plan is replayed: finished runs return at once.
Where the stages of a run leave no rows, its error (code `no_rows`) is thrown at the yield: a plan for which
that is an end catches it. Before anything is computed it is executed with empty reports, whose metrics are
all missing; it must handle them.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from luthier.errors import RecipeError
from luthier.registry import family


@family
class Plan:
    """Family: `report = yield recipe.but(...)`; a list yields several and is answered with a list."""

    def recipes(self, recipe: Any) -> Generator[Any, Any, Any]:
        """recipe: without its plan. May return the report that stands for the whole; else it is the
        last one.
        """
        raise NotImplementedError

    def front(self, recipe: Any) -> Mapping[str, float | None]:
        """The metrics of which its runs make a front, and where the volume of each begins, if that is said;
        none: no front.
        """
        return {}

    def page(self, report: Any) -> str:
        """A page about the whole, beside those of the runs; none where it says nothing more. report: of the
        whole.
        """
        return ""


def one_epoch(recipe: Any) -> dict[str, float]:
    """Changes for a round of sampling and training: where the recipe leaves epochs open, one; the next round
    has samples of its own.
    """
    return {"num_train_epochs": 1.0} if recipe.num_train_epochs == "auto" else {}


def measured(report: Any, metric: str) -> float:
    """A number at the end of a run. Raises RecipeError where nothing measured it."""
    try:
        return float(report.after[metric])  # a blank report says 0 to everything
    except KeyError:
        has = ", ".join(sorted(report.after)) or "nothing"
        raise RecipeError(
            f"this plan selects by '{metric}', but the run in {report.folder} measured {has};"
            " add its evaluator under `evaluate`"
        ) from None


def better(report: Any, best: Any, metric: str) -> bool:
    """Is a metric higher in a report than in the best so far? Where one of them does not say, it may be."""
    now, was = report.after.get(metric), None if best is None else best.after.get(metric)
    return now is None or was is None or now > was


def holds(report: Any, metric: str) -> bool:
    """Is a metric at the end of a run no lower than before it? Where one was not measured, it may be."""
    now, was = report.after.get(metric), report.before.get(metric)
    return now is None or was is None or now >= was
