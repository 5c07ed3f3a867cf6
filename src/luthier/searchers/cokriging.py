"""Co-kriging: runs cut short tell of whole ones, and what is measured next, and how far, is what promises most for its cost.

A linear autoregressive model joins all shares of the steps (f_t = rho f_t-1 + delta), so a configuration measured after a
ninth of its steps moves what is believed of the end. Many configurations
are measured briefly first, the best and a distant one to the end. Then, for every configuration
and share: the improvement expected at the end, times the correlation of what would be measured with it, by what it costs
(augmented expected improvement); or by how much measuring would lower the best mean at the end, by cost (knowledge
gradient). A run that was paused goes on and costs only the difference.

Departs from the augmented improvement: noise counts in the correlation, in place of a factor of its own. Several goals: the
improvement is that of the hypervolume, the correlation the mean over goals.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from luthier.method import searcher
from luthier.searchers import _acquire
from luthier.searchers._acquire import gain, improvement, most, normals
from luthier.searchers._brackets import Shares
from luthier.searchers._searcher import Asked, further, layers, ranked, rng
from luthier.searchers._surrogates import fit


@searcher(paper="arXiv:2311.13050", row="mf-bayesopt-survey")
class CoKriging(Shares):
    """Few and costly runs whose first part already tells something."""

    acquisition: Literal["augmented_improvement", "knowledge_gradient"] = "augmented_improvement"  # the latter: one goal only
    n_startup_trials: Annotated[int, Field(ge=1)] | None = None  # measured after min_share first; null: 2 (d + 1)
    deterministic_objective: bool = False  # would the same configuration give the same numbers again? Else noise is fitted
    n_simulations: Annotated[int, Field(ge=8)] = 64  # draws behind an expectation that has no closed form

    def ask(self, space, seen, goals, clock):
        begin = self.begin(space, seen, rng(clock, "design"))
        if begin is not None:
            return begin
        draw, at, shares = rng(clock, "ask", len(seen)), _acquire.vectors(space, seen), np.array(self.shares)
        level = np.array([np.abs(shares - s.share).argmin() for s in seen])
        X, Y = space.features(at), np.empty((len(seen), goals))
        for t in set(level.tolist()):  # outliers are those of their share
            Y[level == t] = _acquire.values_of([s for s, u in zip(seen, level) if u == t])
        models = [fit(X, y, level, len(shares), 0.0 if self.deterministic_objective else None) for y in Y.T]
        known = {x.tobytes(): s for x, s in zip(_acquire.vectors(space, further(seen)).round(6), further(seen))}
        paid = {space.features(np.frombuffer(k)[None]).round(6)[0].tobytes(): s.share for k, s in known.items()}
        promise = self.promise(models, X, Y, level, seen, draw)
        kept = _acquire.allowed(X, seen)

        def each(Z):
            """[c, T] what a configuration promises at each share for what it costs; below 0 where it was paid already."""
            before = np.array([paid.get(z.tobytes(), 0.0) for z in Z.round(6)])
            cost = shares - before[:, None]
            return np.where(cost > 1e-6, promise(Z) * np.reshape(kept(Z), (-1, 1)) / np.maximum(cost, 1e-6), -np.inf)

        mean = np.stack([m.at(X)[0] for m in models], 1)
        good = at[np.argsort(layers(mean), kind="stable")[:10]]
        best = most(space, lambda Z: each(Z).max(1), good, lambda Z: each(Z).max(1) > -np.inf, draw)
        there = known.get(best.round(6).tobytes())
        share = float(shares[int(each(space.features(best[None]))[0].argmax())])
        return Asked(space.decode(best) if there is None else dict(there.point), share, None if there is None else there.number)

    def begin(self, space, seen, draw):
        """Fewer configurations after each share, but at least two, far apart, as one alone says nothing of rho; None when done."""
        n = self.n_startup_trials or 2 * (len(space.dims) + 1)
        for rung, share in enumerate(self.shares):
            there = [s for s in further(seen) if s.share >= share - 1e-9]
            if rung == 0 and len(there) < n:
                return Asked(_acquire.first(space, n, len(there), draw), share)
            if len(there) < min(n, max(2, int(n / self.eta**rung))):
                below = [s for s in ranked(further(seen)) if s.share < share - 1e-9]
                far = lambda s: min(np.linalg.norm(space.encode(s.point) - space.encode(t.point)) for t in there)
                best = max(below, key=far) if len(there) == 1 else below[0]
                return Asked(dict(best.point), share, best.number)
        return None

    def promise(self, models, X, Y, level, seen, draw):
        """Z [c, features] -> [c, T] what measuring at each share promises for the end."""
        top, z = models[0].top, normals(self.n_simulations)
        if self.acquisition == "knowledge_gradient" and len(models) == 1:
            return lambda Z: np.stack([gain(models[0], X, Z, z, level=t) for t in range(top + 1)], 1)
        inside = np.array([s.over <= 0 for s in seen])
        whole = next(x for x in ((level == top) & inside, level == top, inside, level >= 0) if x.any())  # whose values are to be beaten
        if len(models) > 1:
            improve = _acquire.of_volume(models, X[whole], np.stack([m.at(X[whole])[0] for m in models], 1), draw)
        else:
            model, best = models[0], float(models[0].at(X[whole])[0].min())
            improve = lambda Z: improvement(model.at(Z)[0], np.sqrt(model.at(Z)[1]), best)
        return lambda Z: improve(Z)[:, None] * np.mean([self.tells(m, Z) for m in models], 0)

    def tells(self, model, Z):
        """[c, T] how much a measurement at each share correlates with the function at the end."""
        end = model.at(Z)[1]
        of = lambda t: model.along(Z, t) / np.sqrt((model.at(Z, t)[1] + model.noise) * end + 1e-24)
        return np.clip(np.stack([of(t) for t in range(model.top + 1)], 1), 0.0, 1.0)
