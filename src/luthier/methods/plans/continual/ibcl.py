"""IBCL: a stream of tasks of which several posteriors each are stored, so that a model for any preference
over the tasks is put together without training.

Each task is learned once from each of the priors, by variational inference (estimator `variational`): of the
first task these are normal distributions of different deviations around 0, of a later one the posteriors of
the task before it. A posterior that is near to a stored one is replaced by that one, so the store grows more
slowly than the stream. For a preference w the posteriors are mixed with the weights w_i / m, and models are
drawn from a box around the mixture (evaluator `task_preferences`). The last run trains nothing: it is the
mean of the mixture for `preference`, and has measured all `preferences` (Lu et al., 2023).

Departs: distances are 2-Wasserstein over the square root of how many numbers there are, so that a threshold
does not depend on the tuner; what a replaced posterior's run has left on disk stays there.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.estimators.first_order._posterior import Posterior, distance, posterior_of
from luthier.methods.plans._base import Plan
from luthier.registry import plan

EVERY = 10**9  # rows: all that there are


@plan(
    paper="arXiv:2310.02995",
    row="ibcl",
    use_when="tasks come one after the other and those who use the model weigh them differently: each"
    " weighting gets a model of its own, and none is trained for it.",
    costs="a run for each task and prior; nothing for a preference but the mean of stored tensors.",
    covers="posteriors of each task from several priors under any tuner, a store that grows less than the"
    " stream, preferences by mixtures and their boxes, the model of one preference.",
    omits="the guarantee over whole models (the box holds 1 - alpha of each number), the lower bound of the"
    " credal set, features of other networks (a frozen network with any tuner or head takes their place),"
    " memory-based baselines.",
    tests=[
        "methods/plans/continual/test_ibcl.py::test_runs_start_from_the_posteriors_of_the_task_before",
        "methods/plans/continual/test_ibcl.py::test_mixtures_are_weighted_means",
        "methods/plans/continual/test_ibcl.py::test_a_task_that_comes_again_stores_nothing",
        "methods/plans/continual/test_ibcl.py::test_preferences_need_no_training",
    ],
)
class IBCL(Plan):
    """A run for each task and prior, then one without steps that mixes what is stored."""

    tasks: tuple[str, ...] = ("None",)  # values of the column, in the order in which they are learned
    column: str = "source"  # column that names the task of a row, in training and held-out rows
    # deviation of each prior of the first task; as many posteriors are learned for each task
    prior_sigmas: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (0.2, 0.25, 0.3)
    # how near, by root mean square over numbers, a posterior has to be to a stored one to be replaced by it
    distance: Annotated[float, Field(ge=0)] = 0.01
    # weights of the tasks, of each preference that is measured; left out: each task alone, and all alike
    preferences: tuple[tuple[float, ...], ...] = ()
    preference: tuple[float, ...] = ()  # of the model that the plan ends with; left out: all alike
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.01  # probability of a number outside of the box
    samples: Annotated[int, Field(ge=0)] = 0  # models drawn from it for each preference; 0: the mean alone

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("a stream needs at least one task")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks: each can be there once")
        chosen = [*self.preferences, self.preference] if self.preference else self.preferences
        for weights in chosen:
            if len(weights) != len(self.tasks) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
                raise RecipeError(
                    f"plan 'ibcl': a preference has a weight for each of the {len(self.tasks)} tasks, none"
                    f" negative, and their sum is 1, not {list(weights)}"
                )

    def recipes(self, recipe):
        settings = self.estimator_of(recipe)
        if recipe.init_from is not None:
            raise RecipeError("plan 'ibcl': the first task starts from its priors; leave init_from out")
        stored: dict[str, Posterior | None] = {}
        folders: dict[str, list[str]] = {}
        former: list[str] = []
        table = []
        for name in self.tasks:
            quotas = {"name": "quotas", "column": self.column, "counts": {name: EVERY}, "cap": 0}
            base = recipe.but(stages=[quotas, *(recipe.stages or ())])
            runs = []
            for j, sigma in enumerate(self.prior_sigmas):
                estimator = {**settings, "prior_sigma": sigma}
                start = {"init_from": former[j]} if former else {}
                runs.append(base.but(estimator=estimator, **start))
            reports = yield runs
            former = [self.store(str(report.folder), stored) for report in reports]
            folders[name] = former
            table.append({"after": name, "posteriors": len(stored)})
        report = yield self.mixed(recipe, folders)
        report.stats["table"] = table
        learned = len(self.tasks) * len(self.prior_sigmas)
        report.stats["ibcl"] = {"posteriors": len(stored), "runs": learned}
        report.notes.append(f"{len(stored)} of {learned} posteriors are stored")
        return report

    def estimator_of(self, recipe: Any) -> dict[str, Any]:
        """The settings of estimator `variational`. Raises RecipeError where the recipe has another one."""
        own = recipe.estimator
        settings = dict(own) if isinstance(own, dict) else {"name": own}
        if settings["name"] == "backprop":
            return {"name": "variational"}
        if settings["name"] != "variational":
            raise RecipeError(
                "plan 'ibcl' learns posteriors by estimator 'variational', and the recipe has"
                f" '{settings['name']}'"
            )
        return settings

    def store(self, folder: str, stored: dict[str, Posterior | None]) -> str:
        """The folder of the stored posterior that stands for a run's: its own, or that of a near one."""
        own = posterior_of(folder)
        near = {}
        for name, other in stored.items():
            if own is not None and other is not None:  # there are none in a dry run
                near[name] = distance(own, other)
        nearest = min(near, key=near.__getitem__, default=None)
        if nearest is not None and near[nearest] <= self.distance:
            return nearest
        stored[folder] = own
        return folder

    def mixed(self, recipe: Any, folders: dict[str, list[str]]) -> Any:
        """The run without steps that begins as the mean of the mixture, and measures all preferences."""
        count, m = len(self.tasks), len(self.prior_sigmas)
        preference = self.preference or (1 / count,) * count
        measure = {"name": "task_preferences", "posteriors": folders, "column": self.column}
        measure |= {"alpha": self.alpha, "samples": self.samples}
        if self.preferences:
            measure["preferences"] = [list(weights) for weights in self.preferences]
        weights = [weight / m for weight in preference for _ in range(m)]
        every = [folder for of_task in folders.values() for folder in of_task]
        start = {"merge": {"name": "average", "weights": weights}, "of": every}
        evaluate = [*(recipe.evaluate or ()), measure]
        return recipe.but(init_from=start, max_steps=0, evaluate=evaluate, estimator="backprop")
