"""A diffusion model of two numbers on which objectives over denoising steps can be observed in seconds.

Samples are drawn by DDIM with eta 1, so every step is a Gaussian with a known variance. The noise that the
base predicts is exact for normal data; a small network, which says nothing at first, is what is trained. A
trajectory is a completion whose tokens are its steps: objectives see log-probabilities of steps, as they see
those of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luthier.model.batch import collate
from luthier.text.encode import Encoded


class Denoiser(nn.Module):
    """A sampler of pairs of numbers by `steps` Gaussian steps."""

    signal: Tensor

    def __init__(self, steps: int = 20, width: int = 32, spread: float = 0.5):
        """spread: standard deviation of the data, whose mean is 0."""
        super().__init__()
        self.steps, self.spread = steps, spread
        betas = torch.linspace(1e-3, 0.35, steps + 1)
        self.register_buffer("signal", (1 - betas).cumprod(0))  # [steps + 1] share of the signal's variance
        last = nn.Linear(width, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.learned = nn.Sequential(nn.Linear(3, width), nn.Tanh(), last)
        # of the last trajectories: [N * steps, 2] before and after each step, [N * steps] its time
        self.before = self.after = torch.zeros(0, 2)
        self.time = torch.zeros(0, dtype=torch.long)

    def noise(self, x: Tensor, time: Tensor) -> Tensor:
        """[N, 2] points and [N] times -> [N, 2] the noise that is in them."""
        signal = self.signal[time][:, None]
        exact = (1 - signal).sqrt() * x / (signal * self.spread**2 + 1 - signal)
        place = torch.cat([x, time[:, None] / self.steps], 1)
        return exact + self.learned(place)

    def step(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 2] points at times from 1 on -> mean [N, 2] and standard deviation [N, 1] of the next."""
        now, then = self.signal[time][:, None], self.signal[time - 1][:, None]
        noise = self.noise(x, time)
        clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
        deviation = ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
        mean = then.sqrt() * clean + (1 - then - deviation.square()).sqrt() * noise
        return mean, deviation

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """[n, 2] points, with their trajectories remembered."""
        x = torch.randn(n, 2, generator=rng)
        before, after, times = [], [], []
        for t in range(self.steps, 0, -1):
            time = torch.full((n,), t)
            mean, deviation = self.step(x, time)
            before.append(x)
            x = mean + deviation * torch.randn(n, 2, generator=rng)
            after.append(x)
            times.append(time)
        self.before = torch.stack(before, 1).flatten(0, 1)
        self.after = torch.stack(after, 1).flatten(0, 1)
        self.time = torch.stack(times, 1).flatten()
        return x

    def follow(self, other: Denoiser) -> None:
        """Remember the trajectories of another sampler, to say how likely they are here."""
        self.before, self.after, self.time = other.before, other.after, other.time

    def logprobs(self, batch: Any) -> Tensor:
        """[T] log-density of each step of the batch."""
        steps = batch.labels[batch.targets]
        mean, deviation = self.step(self.before[steps], self.time[steps])
        return torch.distributions.Normal(mean, deviation).log_prob(self.after[steps]).sum(1)


def pairs(scores: Sequence[float], steps: int) -> list[dict]:
    """Trajectories 2i and 2i + 1 as the two completions of a row, scored by where they ended."""
    rows = []
    for i in range(0, len(scores), 2):
        completions = [list(range(k * steps, (k + 1) * steps)) for k in (i, i + 1)]
        both = [float(score) for score in scores[i : i + 2]]
        rows.append({"id": str(i), "prompt": [0], "completions": completions, "scores": both})
    return rows


def batch_of(rows: Sequence[dict]) -> Any:
    """Rows of `pairs` as a batch."""

    def encode(row: dict) -> Encoded:
        return Encoded(row["prompt"], row["completions"], [[True] * len(c) for c in row["completions"]])

    return collate(rows, encode)
