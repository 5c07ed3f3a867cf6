"""A reward model of a few numbers that can read a prompt and a completion together, for tests of rows."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from luthier.model.batch import collate
from luthier.registry import build
from luthier.text.encode import Encoded


class Bilinear(nn.Module):
    """value = completion's mean embedding @ (that of the prompt @ W + b), at each of its tokens."""

    def __init__(self, words: list[str], width: int = 32):
        super().__init__()
        torch.manual_seed(0)
        self.ids = {word: i for i, word in enumerate(words)}
        self.prompts, self.answers = nn.Embedding(len(words), width), nn.Embedding(len(words), width)
        self.joined = nn.Linear(width, width)

    def encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split() if word in self.ids]

    def value(self, prompt: str, text: str) -> torch.Tensor:
        asks, says = (torch.tensor(self.encode(part), dtype=torch.long) for part in (prompt, text))
        known = self.prompts(asks).sum(0) if len(asks) else torch.zeros(self.joined.in_features)
        return (self.joined(known) * self.answers(says).sum(0)).sum()

    def outputs(self, batch) -> SimpleNamespace:
        each = []
        for row in batch.rows:
            for text in row["completions"]:
                each.append(self.value(row["prompt"], text).expand(len(self.encode(text))))
        return SimpleNamespace(values=torch.cat(each))

    def batch_of(self, rows: list[dict]):
        def encoded(row):
            ids = [self.encode(text) for text in row["completions"]]
            return Encoded([0], ids, [[True] * len(i) for i in ids])

        return collate(rows, encoded)

    def learn(self, rows: list[dict], steps: int = 150, size: int = 32) -> Bilinear:
        """By objective `reward`."""
        roles, rng = SimpleNamespace(policy=self), torch.Generator().manual_seed(0)
        objective, adam = build("objective", "reward"), torch.optim.Adam(self.parameters(), lr=0.02)
        for _ in range(steps):
            some = [rows[i] for i in torch.randint(len(rows), (size,), generator=rng).tolist()]
            adam.zero_grad()
            objective.loss(roles, self.batch_of(some)).mean().backward()
            adam.step()
        return self

    @torch.no_grad()
    def accuracy(self, rows: list[dict]) -> float:
        """Of pairs, the better first; ties count one half."""
        right = 0.0
        for row in rows:
            better, worse = (float(self.value(row["prompt"], text)) for text in row["completions"])
            right += 1.0 if better > worse else 0.5 * (better == worse)
        return right / len(rows)
