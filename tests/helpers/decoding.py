"""Language models written out as tables, for decoders: all that may be written can be enumerated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.methods.rewards._base import Reward
from luthier.model.generate import Writer, generate

STOP = 0  # the token that ends a text
Table = Callable[[tuple[int, ...]], Sequence[float]]  # tokens so far -> probabilities of the next


class TableWriter(Writer):
    """Writes with the probabilities of a table."""

    def __init__(self, table: Table):
        self.table, self.model, self.device = table, nn.Linear(1, 1), torch.device("cpu")
        self.attached = SimpleNamespace(changes_inputs=False)

    def announce(self, prompts, rows):
        """No tuner reads along."""

    def begin(self, prompts, n):
        self.texts = [tuple(prompt) for prompt in prompts for _ in range(n)]
        return self.logits()

    def keep(self, rows):
        self.texts = [self.texts[i] for i in rows.tolist()]

    def next(self, tokens):
        self.texts = [(*text, token) for text, token in zip(self.texts, tokens.tolist(), strict=True)]
        return self.logits()

    def logits(self) -> Tensor:
        return torch.tensor([self.table(text) for text in self.texts]).log()


class TablePolicy:
    """In the place of a policy."""

    def __init__(self, table: Table):
        self.table = table

    def generate(self, prompts: Sequence[Sequence[int]], **how: Any) -> list[list[list[int]]]:
        return generate(TableWriter(self.table), [list(prompt) for prompt in prompts], **how)


class By(Reward):
    """A reward by any function of the text."""

    name = "by"

    def __init__(self, function: Callable[[str], float]):
        object.__setattr__(self, "function", function)

    def scores(self, row, texts):
        return [float(self.function(text)) for text in texts]


def table_roles(table: Table, words: str = ".abcdefgh") -> Any:
    """Roles whose policy is a table; token k reads as the k-th of `words`, the stop token as nothing."""
    tokens = {word: [k] for k, word in enumerate(words)}
    tokenizer = SimpleNamespace(encode=lambda text, **_: [k for word in text for k in tokens[word]])
    read = lambda ids: "".join(words[k] for k in ids if k != STOP)
    renderer = SimpleNamespace(answer=read, text=read, stop_ids=[STOP], tokenizer=tokenizer)
    return SimpleNamespace(policy=TablePolicy(table), renderer=renderer)


def enumerate_texts(table: Table, most: int, text: tuple[int, ...] = ()) -> dict[tuple[int, ...], float]:
    """Every text of at most so many tokens -> its probability."""
    if len(text) == most or STOP in text:
        return {text: 1.0}
    out: dict[tuple[int, ...], float] = {}
    for token, p in enumerate(table(text)):
        for whole, rest in enumerate_texts(table, most, (*text, token)).items():
            out[whole] = out.get(whole, 0.0) + p * rest
    return out


def tilted(texts: dict[tuple[int, ...], float], score: Callable[[tuple[int, ...]], float]) -> dict:
    """p(text) * exp(score(text)), normalised."""
    weights = {text: p * torch.tensor(score(text)).exp().item() for text, p in texts.items()}
    total = sum(weights.values())
    return {text: weight / total for text, weight in weights.items()}


def variation(samples: Sequence[Sequence[int]], expected: dict[tuple[int, ...], float]) -> float:
    """Total variation between frequencies and probabilities."""
    counts: dict[tuple[int, ...], int] = {}
    for sample in samples:
        counts[tuple(sample)] = counts.get(tuple(sample), 0) + 1
    gaps = []
    for text in {*counts, *expected}:
        gaps.append(abs(counts.get(text, 0) / len(samples) - expected.get(text, 0.0)))
    return sum(gaps) / 2
