"""A Gaussian process and its expected improvement (of the hypervolume, with several goals). Optuna's.

It does not support conditional settings: inactive ones are set to their defaults.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from luthier.methods.searchers._base import load_optuna
from luthier.methods.searchers._optuna import OptunaSearcher
from luthier.registry import searcher


@searcher(
    paper="arXiv:1807.02811",
    use_when="runs are few and costly, settings up to about ten, with Optuna's Gaussian process.",
    costs="a Gaussian process is fitted between runs; needs the extra `search`.",
)
class GP(OptunaSearcher):
    """For few and costly runs, up to about ten settings."""

    conditional: ClassVar[bool] = False

    n_startup_trials: Annotated[int, Field(ge=1)] = 10  # initial random trials
    deterministic_objective: bool = False  # the same configuration always gives the same numbers

    def sampler(self, seed, constraints):
        return load_optuna().samplers.GPSampler(
            seed=seed,
            constraints_func=constraints,
            n_startup_trials=self.n_startup_trials,
            deterministic_objective=self.deterministic_objective,
        )
