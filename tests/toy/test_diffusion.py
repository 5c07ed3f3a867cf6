"""The toy denoiser: exact where a formula is."""

from __future__ import annotations

import torch

from luthier.toy.diffusion import Denoiser


def test_the_denoiser_is_exact_for_normal_data():
    """The mean of x0 given x_t = sqrt(a) x0 + sqrt(1 - a) e is sqrt(a) s^2 / (a s^2 + 1 - a) x_t, and what it
    says of x0, of the noise and of the score are one statement.
    """
    sampler, spread = Denoiser(spread=0.5).double(), 0.5
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (1, 7, sampler.steps):
        signal = sampler.signal[t]
        noise = sampler.noise(points, torch.full((200,), t))
        clean = (points - (1 - signal).sqrt() * noise) / signal.sqrt()
        variance = signal * spread**2 + 1 - signal
        torch.testing.assert_close(clean, signal.sqrt() * spread**2 / variance * points, rtol=1e-6, atol=1e-9)
        score = (signal.sqrt() * clean - points) / (1 - signal)
        torch.testing.assert_close(score, -points / variance, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(-(1 - signal).sqrt() * score, noise, rtol=1e-6, atol=1e-9)


def test_a_denoiser_learns_the_same_by_regression():
    """Least squares of x0 on x_t, which is what denoising score matching fits, finds the same coefficient."""
    sampler, spread = Denoiser(spread=0.5), 0.5
    rng = torch.Generator().manual_seed(1)
    clean = spread * torch.randn(100_000, generator=rng)
    signal = sampler.signal[10]
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * torch.randn(100_000, generator=rng)
    slope = float((noisy * clean).sum() / noisy.square().sum())
    exact = float(signal.sqrt() * spread**2 / (signal * spread**2 + 1 - signal))
    assert abs(slope / exact - 1) < 0.03
