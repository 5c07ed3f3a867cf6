"""In-context regression: the exact predictors, and a transformer that forgets the one and gets it back."""

from __future__ import annotations

import pytest
import torch

from luthier.toy.regression import InContext, Tasks, losses, scaled


def test_predictors_are_the_posterior_means():
    """Against weights drawn from each prior and weighed by their likelihood."""
    tasks = Tasks(dimensions=2, points=6, vectors=3, noise=0.5)
    rng = torch.Generator().manual_seed(1)
    x, y, _ = (part.double() for part in tasks.draw(3, 0.5, rng))
    drawn = torch.randn(200_000, 2, generator=rng, dtype=torch.float64)
    predictions = {"ridge": tasks.ridge(x, y), "discrete": tasks.discrete(x, y)}
    for name, weights in (("ridge", drawn), ("discrete", tasks.vectors.double())):
        errors = torch.einsum("bnd,kd->bnk", x, weights) - y[..., None]
        past = errors.square().cumsum(1) - errors.square()
        shares = (-past / (2 * tasks.noise**2)).softmax(-1)
        expected = (torch.einsum("bnd,kd->bnk", x, weights) * shares).sum(-1)
        torch.testing.assert_close(predictions[name], expected, rtol=0.02, atol=0.03)
    evidence = []
    for weights in (tasks.vectors.double(), drawn):
        errors = torch.einsum("bnd,kd->bnk", x, weights) - y[..., None]
        past = errors.square().cumsum(1) - errors.square()
        evidence.append((-past / (2 * tasks.noise**2)).exp().mean(-1))
    expected = 0.3 * evidence[0] / (0.3 * evidence[0] + 0.7 * evidence[1])
    torch.testing.assert_close(tasks.set_probability(x, y, 0.3), expected, rtol=0.05, atol=0.02)


def test_each_predictor_is_best_where_its_prior_is_true():
    tasks, rng = Tasks(), torch.Generator().manual_seed(2)
    for discrete, best in ((0.0, tasks.ridge), (1.0, tasks.discrete)):
        rows = tasks.draw(2000, discrete, rng)
        others = (tasks.ridge, tasks.discrete, lambda x, y: tasks.mixture(x, y, 0.5))
        lowest = losses(best, *rows)[2:].mean()
        assert all(lowest <= losses(one, *rows)[2:].mean() + 1e-6 for one in others)
    # the past alone is read
    x, y, _ = tasks.draw(4, 0.5, rng)
    later = y.clone()
    later[:, -1] += 1
    for predict in (tasks.ridge, tasks.discrete, InContext(tasks)):
        torch.testing.assert_close(predict(x, y), predict(x, later))


@pytest.mark.slow
def test_scaled_labels_bring_ridge_regression_back():
    """Pretrained on a wide normal distribution and a fixed vector, tuned on this alone: the loss of other
    tasks rises, and falls again where labels are scaled, so that they look less like those of tuning. The
    untuned model gains far less by it. Labels of zero, towards which a scaled prediction of the fixed vector
    shrinks, would be worse.
    """
    wide, usual = (Tasks(dimensions=2, points=8, vectors=1, spread=spread) for spread in (4.0, 1.0))
    torch.manual_seed(0)
    model = InContext(wide, width=32).learn(wide, 0.5, steps=800, rate=3e-3)
    rows = usual.draw(2000, 0.0, torch.Generator().manual_seed(9))
    of_set = usual.draw(2000, 1.0, torch.Generator().manual_seed(8))
    score = lambda gamma, some=rows: float(losses(scaled(model, gamma), *some)[2:].mean())
    gammas = (1.5, 2.0, 3.0)
    base, base_set = score(1.0), score(1.0, of_set)
    base_gains = [base - score(gamma) for gamma in gammas]
    model.learn(wide, 1.0, steps=150, seed=1)
    tuned, zero = score(1.0), float(losses(lambda x, y: 0 * y, *rows)[2:].mean())
    assert tuned > 2 * base, "tuning forgets ridge regression"
    assert score(1.0, of_set) < 0.5 * base_set, "and learns its set"
    gains = [tuned - score(gamma) for gamma in gammas]
    assert min(gains) > 0.2, "each factor brings some of it back"
    assert all(gain > 2 * other for gain, other in zip(gains, base_gains, strict=True))
    assert score(3.0) < 0.8 * zero
    x, y, _ = rows
    assert torch.equal(scaled(model, 1.0)(x, y), model(x, y))
