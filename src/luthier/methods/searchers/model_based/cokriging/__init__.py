"""Co-kriging: partial runs predict full ones, and the next configuration and its number of steps are those
with the highest value per cost.

A linear autoregressive model joins all fractions of the steps (f_t = rho f_t-1 + delta), so a measurement
after a ninth of the steps updates the prediction at the end. First many configurations are measured briefly,
and a few of them further. Then each configuration and fraction is rated per cost: the expected improvement at
the end times the correlation of the measurement with the end (augmented expected improvement), or the
expected decrease of the best mean at the end (knowledge gradient). A paused run is resumed and costs only the
difference.

Departs from the augmented improvement: noise is part of the correlation instead of a separate factor. Several
goals: the improvement is that of the hypervolume, the correlation the mean over goals. Constraints are
assumed to be the same at every fraction.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from luthier.methods.searchers._base import Suggestion, best_first, latest, pareto_ranks, rng
from luthier.methods.searchers.bandit._brackets import Shares
from luthier.methods.searchers.model_based import _acquire
from luthier.methods.searchers.model_based._acquire import gain, improvement, most, normals
from luthier.methods.searchers.model_based.cokriging.levels import joint, on
from luthier.registry import searcher


@searcher(
    paper="arXiv:2311.13050",
    row="mf-bayesopt-survey",
    use_when="the first part of a run already tells much about its end, and runs are costly.",
    costs="a model is fitted between runs; paused runs keep their checkpoints.",
    covers="co-kriging of brief and whole runs, and where to measure next.",
    omits="the survey's other surrogates (polynomial chaos, physics).",
    tests=[
        "methods/searchers/model_based/test_cokriging.py::test_the_joint_covariance_is_that_of_the_recursion",
        "methods/searchers/model_based/test_cokriging.py::test_it_pays_less_for_the_optimum",
    ],
)
class CoKriging(Shares):
    """For few and costly runs whose first part is informative."""

    # acquisition function; knowledge gradient only with a single goal
    acquisition: Literal["augmented_improvement", "knowledge_gradient"] = "augmented_improvement"
    # initial trials at min_share; null: 2 (d + 1)
    n_startup_trials: Annotated[int, Field(ge=1)] | None = None
    # the same configuration always gives the same numbers; false: noise is fitted
    deterministic_objective: bool = False
    n_simulations: Annotated[int, Field(ge=8)] = 64  # samples for an expectation without closed form

    def ask(self, space, history, goals, clock):
        begin = self.begin(space, history, rng(clock, "design"))
        if begin is not None:
            return begin
        draw, shares = rng(clock, "ask", len(history)), np.array(self.shares)
        at = _acquire.vectors(space, history)
        level = np.array([np.abs(shares - s.share).argmin() for s in history])
        X, Y = space.features(at), np.empty((len(history), goals))
        for t in set(level.tolist()):  # what is an outlier is told by its own share
            Y[level == t] = _acquire.values_of([s for s, u in zip(history, level) if u == t])
        noise = 0.0 if self.deterministic_objective else None
        models = [joint(np.column_stack([X, level]), y, len(shares), noise) for y in Y.T]
        promise, feasible = self.promise(models, X, level, history, draw), _acquire.allowed(X, history)

        def each(Z, paid):
            """[c, T] what is promised at each share by what it costs, -inf where it was paid already."""
            cost = shares - np.reshape(paid, (-1, 1))
            return np.where(
                cost > 1e-6, promise(Z) * np.reshape(feasible(Z), (-1, 1)) / np.maximum(cost, 1e-6), -np.inf
            )

        end = np.stack([m.at(on(m.top, X))[0] for m in models], 1)
        good = at[np.argsort(pareto_ranks(end), kind="stable")[:10]]
        new = most(space, lambda Z: each(Z, 0.0).max(1), good, _acquire.unmeasured(X), draw)
        paused = [s for s in latest(history) if s.share < 1 - 1e-9]
        vectors = np.array([new, *(space.encode(s.point) for s in paused)])
        worth = each(space.features(vectors), [0.0, *(s.share for s in paused)])
        best, t = np.unravel_index(int(worth.argmax()), worth.shape)
        if best == 0:
            return Suggestion(space.decode(new), float(shares[t]))
        return Suggestion(dict(paused[best - 1].point), float(shares[t]), paused[best - 1].number)

    def begin(self, space, history, draw):
        """Fewer at each share, but at least two, far apart, as one alone says nothing of rho; None when that
        is done.
        """
        n, shares, last = self.n_startup_trials or 2 * (len(space.dims) + 1), self.shares, latest(history)
        for rung, share in enumerate(shares):
            there = [s for s in last if s.share > share - 1e-9]
            if rung == 0 and len(there) < n:
                return Suggestion(_acquire.first(space, n, len(there), draw), share)
            if len(there) < min(n, max(2, int(n / self.eta**rung))):
                below = best_first([s for s in last if shares[rung - 1] - 1e-9 < s.share < share - 1e-9])
                at = [space.encode(s.point) for s in there]
                best = below[0]  # of all; the second one is what is farthest from it
                if len(at) == 1:
                    best = max(
                        below, key=lambda s, at=at: float(np.linalg.norm(space.encode(s.point) - at[0]))
                    )
                return Suggestion(dict(best.point), share, best.number)
        return None

    def promise(self, models, X, level, history, draw):
        """Z [c, features] -> [c, T] what measuring at each share promises for the end."""
        top, z = models[0].top, normals(self.n_simulations)
        if self.acquisition == "knowledge_gradient" and len(models) == 1:
            (model,), ends = models, on(top, X)
            of = lambda Z, t: gain(model, ends, on(t, Z), z, end=(model.at(on(top, Z))[0], model.along(Z, t)))
            return lambda Z: np.stack([of(Z, t) for t in range(top + 1)], 1)
        inside = np.array([s.violation <= 0 for s in history])
        # what is to be beaten
        whole = next(x for x in ((level == top) & inside, level == top, inside, level >= 0) if x.any())
        ends = on(top, X[whole])
        means = np.stack([m.at(ends)[0] for m in models], 1)
        volume = _acquire.of_volume(models, ends, means, draw) if len(models) > 1 else None

        def improve(Z):
            if volume is not None:
                return volume(on(top, Z))
            mean, variance = models[0].at(on(top, Z))
            return improvement(mean, np.sqrt(variance), float(means.min()))

        return lambda Z: improve(Z)[:, None] * np.mean([self.tells(m, Z) for m in models], 0)

    def tells(self, model, Z):
        """[c, T] how much a measurement at each share correlates with the function at the end."""
        end = model.at(on(model.top, Z))[1]
        of = [
            model.along(Z, t) / np.sqrt((model.at(on(t, Z))[1] + model.noise) * end + 1e-24)
            for t in range(model.top + 1)
        ]
        return np.clip(np.stack(of, 1), 0.0, 1.0)
