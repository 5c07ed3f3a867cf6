"""Rows, and plans played with made-up reports."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from helpers.rows import SUMS
from luthier.data.load import load_rows as load
from luthier.registry import build

GOALS = {"right": "exact_match", "short": {"name": "length", "scale": -0.1}}
SAMPLES = {
    "objective": "grpo",
    "live": [{"name": "rollout", "n": 2, "max_new_tokens": 4}, {"name": "score", "reward": "exact_match"}],
}


ROWS = load(SUMS).rows


def report(folder: str, **after) -> SimpleNamespace:
    return SimpleNamespace(folder=folder, before={}, after=after, metrics=after, stats={}, notes=[])


def played(plan, recipe, reports):
    """The recipes that a plan asks for while it is answered with these reports, and what it returns."""
    play, asked = build("plan", plan).recipes(recipe), []
    reports = iter(reports)
    try:
        asked.append(next(play))
        while True:
            answer = next(reports)
            several = isinstance(asked[-1], list) and not isinstance(answer, list)
            asked.append(play.send([answer] * len(asked[-1]) if several else answer))
    except StopIteration as end:
        return asked, end.value


def tensors(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(4, 3, generator=rng).to(dtype), "b": torch.randn(5, generator=rng).to(dtype)}
