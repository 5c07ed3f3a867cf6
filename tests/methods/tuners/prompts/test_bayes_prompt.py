"""BayesPrompt: particles against the moments of a mixture, one particle against gradient ascent, the mixture
against scikit-learn's, and the prompt before any step.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from helpers.tuners import base, put
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.tuners.prompts import bayes_prompt
from luthier.methods.tuners.prompts.bayes_prompt import (
    EM_STEPS,
    Mixture,
    direction,
    first_shares,
    fitted,
    from_shares,
    particles_of,
    svgd,
)
from luthier.model.batch import collate
from luthier.registry import build


def mixture_1d() -> Mixture:
    weights, means, variances = [0.3, 0.7], [[0.0], [3.0]], [[1.0], [0.5]]
    return Mixture(*(torch.tensor(x, dtype=torch.float64) for x in (weights, means, variances)))


def test_particles_have_the_moments_of_the_mixture():
    """Mean 2.1 and variance 0.65 + 1.89, within 5 percent, from particles of a standard normal."""
    for seed in range(3):
        start = torch.randn(100, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        z = svgd(start, mixture_1d(), steps=500, step_size=0.4)
        assert float(z.mean()) == pytest.approx(2.1, rel=0.05)
        assert float(z.var(unbiased=False)) == pytest.approx(2.54, rel=0.05)


def test_one_particle_climbs_the_gradient():
    mixture = mixture_1d()
    deviations = mixture.variances[:, 0].sqrt()
    components = torch.distributions.Normal(mixture.means[:, 0], deviations)
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(mixture.weights), components
    )
    z = torch.tensor([0.7], dtype=torch.float64)
    for _ in range(50):
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(density.log_prob(z).sum(), z)
        z = z + 0.1 * gradient
    own = svgd(torch.tensor([[0.7]], dtype=torch.float64), mixture, steps=50, step_size=0.1)
    assert float(own) == pytest.approx(float(z.detach()), abs=1e-9)


def test_directions_are_the_formula():
    """Against kernels and their gradients by autograd."""
    rng = torch.Generator().manual_seed(0)
    z, score = torch.randn(2, 5, 3, generator=rng, dtype=torch.float64)
    pairs = torch.stack([(a - b).norm() for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
    h = pairs.median() ** 2 / torch.log(torch.tensor(5.0))
    expected = torch.zeros_like(z)
    for i in range(5):
        for j in range(5):
            other = z[j].clone().requires_grad_()
            kernel = (-((other - z[i]) ** 2).sum() / h).exp()
            (gradient,) = torch.autograd.grad(kernel, other)
            expected[i] += (kernel.detach() * score[j] + gradient) / 5
    assert torch.allclose(direction(z, score), expected, atol=1e-6)


def test_the_mixture_is_that_of_scikit_learn():
    GaussianMixture = pytest.importorskip("sklearn.mixture").GaussianMixture
    rng = torch.Generator().manual_seed(1)
    means = torch.tensor([[0.0, 0, 0], [3, 1, 0], [0, 4, 2]], dtype=torch.float64)
    z = means.repeat(30, 1) + torch.randn(90, 3, generator=rng, dtype=torch.float64)
    shares = first_shares(z, [(i % 3,) for i in range(90)], 3, rng)
    start, own = from_shares(z, shares, 0.1), fitted(z, shares, 0.1)
    reference = GaussianMixture(
        3,
        covariance_type="diag",
        reg_covar=0.1,
        tol=0,
        max_iter=EM_STEPS,
        weights_init=start.weights.numpy(),
        means_init=start.means.numpy(),
        precisions_init=(1 / start.variances).numpy(),
    )
    with pytest.warns(Warning, match="converge"):  # tol=0 takes all steps
        reference.fit(z.numpy())
    assert torch.allclose(own.means, torch.tensor(reference.means_), atol=1e-6)
    assert torch.allclose(own.variances, torch.tensor(reference.covariances_), atol=1e-6)
    assert torch.allclose(own.weights, torch.tensor(reference.weights_), atol=1e-6)


def encoded(row):
    word = row["word"]
    return SimpleNamespace(
        prompt=[3, word, word + 1], completions=[[word % 2 + 40, 1]], supervised=[[True, True]]
    )


def test_the_prompt_starts_as_particles_of_the_rows():
    settings: dict[str, Any] = {"num_virtual_tokens": 4, "particles": 16, "svgd_steps": 200, "init_rows": 12}
    words = range(20, 32)
    attached: Any = put("bayes_prompt", **settings)
    roles = SimpleNamespace(clock=Clock(seed=5), batch=lambda rows: collate(rows, encoded))
    attached.initialize([{"id": w, "word": w} for w in words], roles)
    network: Any = base()
    table = network.get_input_embeddings().weight.detach().double()
    features = torch.stack([table[[3, w, w + 1]].mean(0) for w in words])
    answers = [(w % 2 + 40, 1) for w in words]
    points = particles_of(features, answers, build("tuner", {"name": "bayes_prompt", **settings}), Clock(5))
    equal = (attached.soft().detach()[:, None] == points.float()).all(-1)
    assert equal.any(1).all() and equal.any(0).sum() == 4  # four different particles
    # they lie where the rows do: nearer to them than tokens of the vocabulary
    near = torch.cdist(points, features).amin(1).mean()
    assert near < 0.75 * torch.cdist(table, features).amin(1).mean()
    again: Any = put("bayes_prompt", **settings)
    again.initialize([{"id": w, "word": w} for w in words], roles)
    assert torch.equal(again.soft(), attached.soft())


def test_a_run_starts_at_its_particles(tmp_path, monkeypatch):
    """What a run saves after one step too small to see is different particles of its rows."""
    drawn = []
    own = bayes_prompt.particles_of
    monkeypatch.setattr(bayes_prompt, "particles_of", lambda *how: drawn.append(own(*how)) or drawn[0])
    tuner = {"name": "bayes_prompt", "num_virtual_tokens": 4, "particles": 16, "init_rows": 12}
    data = {"path": "toy:style/new", "n": 24}
    recipe = {"model": "toy:lm-small", "data": data, "tuner": tuner, "learning_rate": 1e-12, "max_steps": 1}
    report = luthier.tune(recipe, folder=tmp_path / "run")
    saved = load_file(Path(report.folder) / "adapter_model.safetensors")["prompt_embeddings"]
    near = torch.cdist(saved.double(), drawn[0])
    assert len(drawn) == 1 and float(near.amin(1).max()) < 1e-6
    assert len(set(near.argmin(1).tolist())) == 4


def test_more_answers_than_components_begin_at_rows():
    z = torch.randn(10, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shares = first_shares(z, [(i,) for i in range(10)], 4, torch.Generator().manual_seed(0))
    assert shares.shape == (10, 4) and (shares.sum(1) == 1).all() and (shares.sum(0) >= 1).all()


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError, match="too few for num_virtual_tokens"):
        build("tuner", {"name": "bayes_prompt", "particles": 4})
    with pytest.raises(RecipeError, match="more than twice reg_covar"):
        build("tuner", {"name": "bayes_prompt", "step_size": 0.5})
