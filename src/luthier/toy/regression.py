"""Linear regression in context, on which it is known exactly what a model should predict before and after
tuning (Kotha et al., 2024).

A sequence holds points x and labels w x + noise of one hidden weight vector w. In pretraining w comes from a
normal distribution or from a fixed set of vectors; tuning draws it from the set alone. The best prediction
for the first is ridge regression, for the set the mean of its vectors under their posterior, and for the
mixture both, each by the probability that the sequence is of its kind.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Predictor = Callable[[Tensor, Tensor], Tensor]  # x [B, N, d], y [B, N] -> [B, N] labels, each from the past


class Tasks:
    """Sequences of both kinds, of N points in d dimensions."""

    def __init__(
        self, dimensions: int = 2, points: int = 10, vectors: int = 6, noise: float = 0.3, spread: float = 1.0
    ):
        """vectors: in the fixed set. noise: standard deviation of a label."""
        rng = torch.Generator().manual_seed(0)
        self.dimensions, self.points, self.noise, self.spread = dimensions, points, noise, spread
        self.vectors = torch.randn(vectors, dimensions, generator=rng)

    def draw(self, count: int, discrete: float, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, d], y [B, N], weights [B, d]. discrete: the probability of a vector of the set."""
        weights = self.spread * torch.randn(count, self.dimensions, generator=rng)
        fixed = self.vectors[torch.randint(len(self.vectors), (count,), generator=rng)]
        of_set = torch.rand(count, 1, generator=rng) < discrete
        weights = torch.where(of_set, fixed, weights)
        x = torch.randn(count, self.points, self.dimensions, generator=rng)
        y = (x @ weights[:, :, None])[..., 0]
        y = y + self.noise * torch.randn(count, self.points, generator=rng)
        return x, y, weights

    def ridge(self, x: Tensor, y: Tensor) -> Tensor:
        """The best predictor of weights from the normal distribution."""
        precision = self.noise**2 * torch.eye(self.dimensions).to(x)
        gram = before((x[..., :, None] * x[..., None, :]).cumsum(1))
        moment = before((x * y[..., None]).cumsum(1))
        weights = torch.linalg.solve(gram + precision, moment[..., None])[..., 0]
        return (x * weights).sum(-1)

    def discrete(self, x: Tensor, y: Tensor) -> Tensor:
        """The best predictor of weights from the set."""
        labels = x @ self.vectors.T.to(x)  # [B, N, vectors]
        errors = before((labels - y[..., None]).square().cumsum(1))
        posterior = (-errors / (2 * self.noise**2)).softmax(-1)
        return (labels * posterior).sum(-1)

    def set_probability(self, x: Tensor, y: Tensor, discrete: float) -> Tensor:
        """[B, N] the probability, given the past, that the weights are of the set. discrete: before it."""
        errors = before((x @ self.vectors.T.to(x) - y[..., None]).square().cumsum(1))
        log_set = (-errors / (2 * self.noise**2)).logsumexp(-1) - torch.tensor(len(self.vectors)).log()
        # of the normal distribution: exp(m A^-1 m / (2 s^2)) (s^2)^(d/2) |A|^(-1/2) with A = X'X + s^2
        variance = self.noise**2
        gram = before((x[..., :, None] * x[..., None, :]).cumsum(1))
        gram = gram + variance * torch.eye(self.dimensions).to(x)
        moment = before((x * y[..., None]).cumsum(1))
        fitted = (moment * torch.linalg.solve(gram, moment[..., None])[..., 0]).sum(-1)
        squares = before(y.square().cumsum(1)[..., None])[..., 0]
        log_normal = (fitted - squares) / (2 * variance) - 0.5 * torch.logdet(gram / variance)
        prior = torch.tensor(discrete, dtype=x.dtype)
        return (log_set - log_normal + prior.log() - (1 - prior).log()).sigmoid()

    def mixture(self, x: Tensor, y: Tensor, discrete: float) -> Tensor:
        """The best predictor of both kinds together: g f_discrete + (1 - g) f_ridge."""
        share = self.set_probability(x, y, discrete)
        return share * self.discrete(x, y) + (1 - share) * self.ridge(x, y)


def before(sums: Tensor) -> Tensor:
    """[B, N, ...] sums up to each point -> those up to the one before it."""
    return torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)


class InContext(nn.Module):
    """A causal transformer over points. Each place reads a point, beside the point before it with its label,
    and predicts the label of its own; that spares the network from finding out which label belongs to which
    point.
    """

    def __init__(self, tasks: Tasks, width: int = 64, layers: int = 2, heads: int = 4):
        super().__init__()
        self.enter = nn.Linear(2 * tasks.dimensions + 1, width)
        self.places = nn.Parameter(0.02 * torch.randn(tasks.points, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, N, d], y [B, N] -> [B, N] predicted labels, each from its point and what is before it."""
        pairs = torch.cat([x, y[..., None]], -1)
        past = torch.cat([torch.zeros_like(pairs[:, :1]), pairs[:, :-1]], 1)
        states = self.enter(torch.cat([x, past], -1)) + self.places
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.blocks(states, mask, is_causal=True))[..., 0]

    def learn(
        self, tasks: Tasks, discrete: float, steps: int, rate: float = 1e-3, size: int = 64, seed: int = 0
    ) -> InContext:
        """Sequences of which this share is of the set, by Adam with a rate that falls to zero."""
        rng = torch.Generator().manual_seed(seed)
        adam = torch.optim.Adam(self.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, max(2, steps))
        for _ in range(steps):
            x, y, _ = tasks.draw(size, discrete, rng)
            adam.zero_grad()
            (self(x, y) - y).square().mean().backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            adam.step()
            schedule.step()
        return self


def scaled(predict: Predictor, gamma: float) -> Predictor:
    """A predictor that reads labels times gamma, and whose predictions are divided by it."""
    return lambda x, y: predict(x, gamma * y) / gamma


@torch.no_grad()
def losses(predict: Predictor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """[N] mean squared error to the labels without noise, for each number of points before it."""
    clean = (x @ weights[:, :, None])[..., 0]
    return (predict(x, y) - clean).square().mean(0)
