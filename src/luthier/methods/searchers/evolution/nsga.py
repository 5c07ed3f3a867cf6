"""NSGA-II: a population, selected by Pareto rank and crowding distance, with crossover and
mutation. Optuna's.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.searchers._base import load_optuna
from luthier.methods.searchers._optuna import OptunaSearcher
from luthier.registry import searcher


@searcher(
    paper="doi:10.1109/4235.996017",
    use_when="several goals and a budget of many runs; the evolutionary baseline.",
    costs="nothing between runs; needs the extra `search`.",
)
class NSGA(OptunaSearcher):
    """The evolutionary baseline for several goals."""

    population_size: Annotated[int, Field(ge=2)] = 10  # configurations per generation
    # probability of crossover; else a child is its parent, mutated
    crossover_prob: Annotated[float, Field(ge=0, le=1)] = 0.9

    def sampler(self, seed, constraints):
        return load_optuna().samplers.NSGAIISampler(
            seed=seed,
            constraints_func=constraints,
            population_size=self.population_size,
            crossover_prob=self.crossover_prob,
        )
