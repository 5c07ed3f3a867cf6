"""TPE: densities of good and of poor configurations; the next one is where their ratio is highest. Optuna's.

Settings are modelled together (multivariate), those of different tuners separately (group).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.searchers._base import load_optuna
from luthier.methods.searchers._optuna import OptunaSearcher
from luthier.registry import searcher


@searcher(
    paper="arXiv:2304.11127",
    use_when="some dozens of runs over mixed settings, with choices that depend on each other.",
    costs="nothing noticeable between runs; needs the extra `search`.",
)
class TPE(OptunaSearcher):
    """Tree-structured Parzen estimators, one goal or several, with constraints."""

    n_startup_trials: Annotated[int, Field(ge=1)] = 10  # initial random trials
    n_ei_candidates: Annotated[int, Field(ge=1)] = 24  # candidates from which the best ratio is chosen

    def sampler(self, seed, constraints):
        return load_optuna().samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=True,
            constraints_func=constraints,
            n_startup_trials=self.n_startup_trials,
            n_ei_candidates=self.n_ei_candidates,
        )
