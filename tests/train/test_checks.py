"""A check reads a few tokens, whatever the rows are."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from helpers import zoo
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.tuners._base import Untuned
from luthier.model.batch import collate
from luthier.model.policy import Policy
from luthier.train.checks import TOKENS, check_forward, excerpt


def long_batch():
    """Two rows of five completions behind a long prompt, and a long text without one."""
    rows = []
    for g in range(2):
        completions = [zoo.tokens(60, 10 * g + k) for k in range(5)]
        marks = [[False] * 3 + [True] * 57] * 5
        rows.append(SimpleNamespace(prompt=zoo.tokens(300, g), completions=completions, supervised=marks))
    text = zoo.tokens(500, 5)
    rows.append(SimpleNamespace(prompt=[], completions=[text], supervised=[[False] + [True] * 499]))
    return collate([{"id": str(i), "e": e} for i, e in enumerate(rows)], lambda row: row["e"])


def test_an_excerpt_is_short_and_of_every_row():
    batch = long_batch()
    part = excerpt(batch)
    parents, sizes = part.parent.tolist(), part.sizes
    read = sum(sizes[s] + (sizes[parents[s]] if parents[s] >= 0 else 0) for s in part.completion.tolist())
    assert read <= TOKENS and set(part.group.tolist()) == {0, 1, 2}
    assert bool((part.lengths > 0).all())
    # of every completion an unbroken stretch
    texts = [str(batch.ids[batch.segment == s].tolist())[1:-1] for s in batch.completion.tolist()]
    for s in part.completion.tolist():
        stretch = str(part.ids[part.segment == s].tolist())[1:-1]
        assert any(stretch in text for text in texts)
    short = zoo.rows()
    assert excerpt(short) is short


def test_a_check_of_long_rows_reads_few_tokens(monkeypatch):
    model = zoo.make("llama")
    read, warnings = [], []
    model.get_input_embeddings().register_forward_hook(lambda m, x, y: read.append(x[0].numel()))
    check_forward(Policy(Causal(), model, Untuned(model)), long_batch(), warnings.append)
    assert not warnings and sum(read) <= 3 * TOKENS + 8  # alone, packed, and the head measured
    assert torch.is_grad_enabled()
