"""Gaussian posteriors of what a tuner trains, one mean and one standard deviation for each number: where a
run leaves them, how far two are apart, and mixtures of several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.storage import checkpoints

ENTRY = "posterior"  # of each group's optimizer state
LOG_SIGMA = "log_sigma"  # in it, by parameter


@dataclass(frozen=True)
class Posterior:
    """Name of a tensor -> means and standard deviations of its numbers. What no run has a spread of is
    certain, with sigma 0.
    """

    mean: Mapping[str, Tensor]
    sigma: Mapping[str, Tensor]


def posterior_of(folder: str) -> Posterior | None:
    """What a run of estimator `variational` ended with; None where nothing is stored there."""
    stored = checkpoints.paths(Path(folder))
    if not stored:
        return None
    moment = checkpoints.load(stored[-1])
    sigma = {}
    for group, of_group in moment.state.items():
        for slot, value in of_group.get(ENTRY, {}).get(LOG_SIGMA, {}).items():
            sigma[f"{group}.{slot}"] = value.double().exp()
    if not sigma:
        raise RecipeError(f"{folder} has no posterior; it needs estimator 'variational'")
    mean = {}
    for name, tensor in moment.tensors.items():
        mean[name] = tensor.double() if tensor.is_floating_point() else tensor
        sigma.setdefault(name, torch.zeros(tensor.shape, dtype=torch.double))
    return Posterior(mean, sigma)


def distance(one: Posterior, other: Posterior) -> float:
    """The 2-Wasserstein distance, divided by the square root of how many numbers are uncertain in either."""
    total, count = 0.0, 0
    for name, sigma in one.sigma.items():
        uncertain = (sigma > 0) | (other.sigma[name] > 0)
        apart = (one.mean[name].double() - other.mean[name].double()).square()
        apart = apart + (sigma - other.sigma[name]).square()
        total += float(apart[uncertain].sum())
        count += int(uncertain.sum())
    return math.sqrt(total / max(count, 1))


def mixture(posteriors: Sequence[Posterior], weights: Sequence[float]) -> Posterior:
    """The posterior whose means and standard deviations are the weighted sums of theirs. Weights sum to 1;
    what is no number of floating point is that of the first.
    """
    if abs(math.fsum(weights) - 1) > 1e-6 or min(weights) < 0:
        raise RecipeError(f"the weights of a mixture are not negative and sum to 1, not {list(weights)}")
    mean, sigma = {}, {}
    for name, first in posteriors[0].mean.items():
        mean[name] = first
        sigma[name] = posteriors[0].sigma[name]
        if not first.is_floating_point():
            continue
        pairs = [(p, w) for p, w in zip(posteriors, weights, strict=True) if w]
        mean[name] = sum((w * p.mean[name] for p, w in pairs), torch.zeros_like(first))
        sigma[name] = sum((w * p.sigma[name] for p, w in pairs), torch.zeros_like(sigma[name]))
    return Posterior(mean, sigma)


def half_width(alpha: float) -> float:
    """Standard deviations to either side of the mean between which a normal number lies with 1 - alpha."""
    from scipy.special import ndtri

    return float(ndtri(1 - alpha / 2))


def sample(
    posterior: Posterior, alpha: float, generators: Mapping[str, torch.Generator]
) -> dict[str, Tensor]:
    """Tensors drawn uniformly from the box that holds 1 - alpha of each number."""
    reach, tensors = half_width(alpha), {}
    for name, mean in posterior.mean.items():
        tensors[name] = mean
        if mean.is_floating_point() and bool((posterior.sigma[name] > 0).any()):
            place = 2 * torch.rand(mean.shape, generator=generators[name], dtype=torch.double) - 1
            tensors[name] = mean + reach * posterior.sigma[name] * place
    return tensors
