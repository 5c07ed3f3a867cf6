"""Noisy expected hypervolume improvement over Gaussian processes, by BoTorch; with the sparse prior of
AutoPEFT.

The first 2 (d + 1) configurations are random. Then each goal has its own process, with `saas` under a prior
by which few settings matter (an ensemble of MAP estimates under different strengths, where the paper samples
with NUTS), and the next configuration has the highest expected improvement over the observations (logarithmic
forms; noise is inferred). The space is searched directly, including choices and integers: many random points,
then neighbours of the best.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.searchers._base import Searcher, Suggestion, finite_values, rng
from luthier.registry import searcher

NEAR = 0.1  # how far a neighbour's settings lie from where they were, of their ranges
CHUNK = 256  # points whose improvement is computed at once


@searcher(
    paper="arXiv:2301.12132",
    use_when="runs are costly, goals several and noisy, and only few settings count; needs the extra"
    " `botorch`.",
    costs="Gaussian processes are fitted between runs.",
)
class BoTorch(Searcher):
    """For costly runs and several noisy goals; many settings, of which few matter."""

    # initial random trials; null: 2 (settings + 1)
    n_startup_trials: Annotated[int, Field(ge=2)] | None = None
    # prior of the length scales; plain: BoTorch's own, which grows with the number of settings
    prior: Literal["saas", "plain"] = "saas"
    candidates: Annotated[int, Field(ge=8)] = 512  # random points from which the local search starts
    climbs: Annotated[int, Field(ge=0)] = 4  # rounds of local search around the best points
    samples: Annotated[int, Field(ge=8)] = 64  # quasi-random normals by which the improvement is computed

    def ask(self, space, history, goals, clock):
        draw = rng(clock, "ask", len(history))
        begun = self.n_startup_trials or 2 * (len(space.dims) + 1)
        if len(history) < begun:
            return Suggestion(space.draw(draw))
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(int(draw.integers(2**31)))
            features = lambda u: torch.tensor(space.features(u), dtype=torch.float64)
            at = np.stack([space.encode(s.point) for s in history])
            # BoTorch goes up
            values = -torch.tensor(finite_values(np.array([s.values for s in history])), dtype=torch.float64)
            violation = torch.tensor([[max(0.0, s.violation)] for s in history], dtype=torch.float64)
            worth = self._worth(features(at), values, violation if violation.any() else None)
            u = np.stack(
                [space.encode(space.decode(x)) for x in draw.random((self.candidates, len(space.dims)))]
            )
            measured = {tuple(x) for x in at}
            scores = worth(features(u))
            for _ in range(self.climbs):
                top = u[scores.argsort(descending=True)[:8].numpy()]
                step = np.repeat(top, 16, 0)
                moved = draw.random(step.shape) < max(1 / step.shape[1], 0.3)
                jump = draw.random(step.shape) < 0.2  # choices have no neighbours but each other
                step = np.where(
                    moved,
                    np.where(jump, draw.random(step.shape), step + NEAR * draw.standard_normal(step.shape)),
                    step,
                )
                step = np.stack([space.encode(space.decode(x.clip(0, 1))) for x in step])
                u, scores = np.concatenate([u, step]), torch.cat([scores, worth(features(step))])
        order = scores.argsort(descending=True).tolist()
        best = next((i for i in order if tuple(u[i]) not in measured), order[0])
        return Suggestion(space.decode(u[best]))

    def _worth(self, x: Tensor, values: Tensor, violation: Tensor | None) -> Any:
        """[n, features], [n, goals] up, [n, 1] how far limits are overstepped -> the logarithm of what points
        promise.
        """
        try:
            from botorch.acquisition.logei import qLogNoisyExpectedImprovement
            from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
            from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
            from botorch.acquisition.objective import GenericMCObjective
            from botorch.sampling.normal import SobolQMCNormalSampler
        except ImportError:
            raise RecipeError("searcher 'botorch' needs BoTorch: pip install 'luthier[botorch]'") from None
        goals = values.shape[1]
        y = (values - values.mean(0)) / values.std(0).clamp_min(1e-9)
        limits = None
        if violation is not None:
            scale = violation.std().clamp_min(1e-9)
            y = torch.cat([y, violation / scale], 1)
            limits = [lambda z: z[..., -1] - 0.05]  # what kept to its limits was measured as 0
        model = self._model(x, y)
        sampler = SobolQMCNormalSampler(torch.Size([self.samples]), seed=0)
        if goals == 1:
            objective = GenericMCObjective(lambda z, X=None: z[..., 0])
            acquire: Any = qLogNoisyExpectedImprovement(
                model, x, sampler=sampler, objective=objective, constraints=limits, prune_baseline=True
            )
        else:
            reference = y[:, :goals].min(0).values - 0.1 * (
                y[:, :goals].max(0).values - y[:, :goals].min(0).values
            )
            objective = IdentityMCMultiOutputObjective(outcomes=list(range(goals)), num_outcomes=y.shape[1])
            acquire = qLogNoisyExpectedHypervolumeImprovement(
                model,
                reference,
                x,
                sampler=sampler,
                objective=objective,
                constraints=limits,
                prune_baseline=True,
            )

        @torch.no_grad()
        def worth(points: Tensor) -> Tensor:
            return torch.cat(
                [acquire(part[:, None, :]).reshape(len(part), -1).mean(1) for part in points.split(CHUNK)]
            )

        return worth

    def _model(self, x: Tensor, y: Tensor) -> Any:
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import ModelListGP, SingleTaskGP
        from botorch.models.map_saas import EnsembleMapSaasSingleTaskGP
        from gpytorch.mlls import ExactMarginalLogLikelihood

        models = []
        for column in y.T:
            kind = EnsembleMapSaasSingleTaskGP if self.prior == "saas" else SingleTaskGP
            model = kind(x, column[:, None])
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            models.append(model)
        return models[0] if len(models) == 1 else ModelListGP(*models)
