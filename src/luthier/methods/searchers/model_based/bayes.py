"""Bayesian optimization as in the tutorial: a Gaussian process with Matern-5/2 kernel, then the expected
improvement.

2 (d + 1) initial points. One goal: the expected improvement in closed form if values have no noise; else the
improvement of the best posterior mean, simulated, which is the same without noise; or the knowledge gradient.
Several goals: a process for each, and the expected improvement of the hypervolume over posterior samples of
the observations, the noisy form of AutoPEFT (arXiv:2301.12132). With constraints: times the probability that
they are met.

Departs: length scales are maximum a posteriori (AutoPEFT: sampled, from the sparse prior that is `sparse`
here); the hypervolume is estimated along random directions instead of boxes; the next point is the best of
many random ones and their neighbours, since settings are often integers and choices, where the tutorial
follows gradients.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from luthier.methods.searchers._base import Searcher, Suggestion, pareto_ranks, rng
from luthier.methods.searchers.model_based import _acquire
from luthier.methods.searchers.model_based._acquire import gain, improvement, most, normals
from luthier.methods.searchers.model_based._surrogates import fit
from luthier.registry import searcher


@searcher(
    paper="arXiv:1807.02811",
    row="bayesopt-tutorial",
    use_when="runs are few and costly, settings up to about twenty, and nothing should be installed for it.",
    costs="2 (d + 1) configurations are spread evenly first; then a model is fitted between runs.",
    covers="Gaussian processes with expected improvement, also of noisy values, and knowledge gradient.",
    tests=[
        "methods/searchers/model_based/test_bayes.py::test_a_posterior_is_the_formula",
        "methods/searchers/model_based/test_bayes.py"
        "::test_the_improvement_in_closed_form_is_what_sampling_says",
        "methods/searchers/model_based/test_bayes.py::test_it_finds_a_minimum_that_chance_does_not",
    ],
)
class Bayes(Searcher):
    """For few and costly runs, up to about twenty settings; needs no further package."""

    # acquisition function with a single goal
    acquisition: Literal["improvement", "knowledge_gradient"] = "improvement"
    # initial trials, spread evenly; null: 2 (d + 1)
    n_startup_trials: Annotated[int, Field(ge=1)] | None = None
    # the same configuration always gives the same numbers; false: noise is fitted
    deterministic_objective: bool = False
    # scale of a prior by which few settings matter (SAAS has 0.1); 0: none
    sparse: Annotated[float, Field(ge=0)] = 0.0
    n_simulations: Annotated[int, Field(ge=8)] = 64  # samples for an expectation without closed form

    def ask(self, space, history, goals, clock):
        n = self.n_startup_trials or 2 * (len(space.dims) + 1)
        if len(history) < n:
            return Suggestion(_acquire.first(space, n, len(history), rng(clock, "design")))
        draw, at = rng(clock, "ask", len(history)), _acquire.vectors(space, history)
        X, Y = space.features(at), _acquire.values_of(history)
        models = [
            fit(X, y, noise=0.0 if self.deterministic_objective else None, sparse=self.sparse) for y in Y.T
        ]
        inside = np.array([s.violation <= 0 for s in history])
        some = inside if inside.any() else np.ones(len(history), bool)  # among whom the best is
        score = (
            self.of_one(models[0], X, Y[:, 0], some, space, draw)
            if goals == 1
            else _acquire.of_volume(models, X[some], Y[some], draw)
        )
        feasible = _acquire.allowed(X, history)
        good = at[some][np.argsort(pareto_ranks(Y[some]), kind="stable")[:10]]
        best = most(space, lambda Z: score(Z) * feasible(Z), good, _acquire.unmeasured(X), draw)
        return Suggestion(space.decode(best))

    def of_one(self, model, X, y, some, space, draw):
        if self.acquisition == "knowledge_gradient":
            among = np.concatenate([X, space.features(draw.random((100, len(space.dims))))])
            return lambda Z: gain(model, among, Z, normals(self.n_simulations))
        if self.deterministic_objective:
            return lambda Z: _improvement(model, Z, float(y[some].min()))
        return lambda Z: gain(model, X[some], Z, normals(self.n_simulations))


def _improvement(model, Z, best):
    mean, variance = model.at(Z)
    return improvement(mean, np.sqrt(variance), best)
