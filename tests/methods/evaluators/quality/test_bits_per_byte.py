"""bits_per_byte: are those of the text."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

import luthier
from helpers.models import make_llama
from helpers.objectives import average
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.evaluators._base import TokenStats
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy
from luthier.recipe.recipe import terms
from luthier.registry import build


def test_bits_per_byte_are_those_of_the_text(base, tmp_path):
    report = luthier.tune(
        {**base, "eval_data": 0.3, "evaluate": ["loss", "bits_per_byte"], "max_steps": 1},
        folder=tmp_path / "a",
    )
    by_row = (
        json.loads((tmp_path / "a" / "per_example-before.json").read_text())
        if (tmp_path / "a" / "per_example-before.json").is_file()
        else None
    )
    assert report.before["bits_per_byte"] > 0 and (by_row is None or len(by_row["loss"]) > 3)
    # a byte is a token here, but for the end of turn, which is asked and says nothing
    tokens = report.before["loss"] / math.log(2)
    assert report.before["bits_per_byte"] == pytest.approx(tokens * 1.7, rel=0.4)


def test_merged_tokens_have_the_same_bits(tmp_path):
    """A model of bytes, and the same model over pairs of bytes, each as likely as its two bytes one after the
    other: the loss per token doubles, the bits per byte are the same.
    """
    rng = torch.Generator().manual_seed(0)
    texts = {"a": "for i in range(10):", "b": "größer als π"}
    losses = {name: torch.rand(len(text.encode()), generator=rng).tolist() for name, text in texts.items()}
    found = []
    for size in (1, 2):
        pieces, stats = {}, {}
        for name, text in texts.items():
            data = text.encode()
            pieces[name] = [data[i : i + size] for i in range(0, len(data), size)]
            stats[name] = TokenStats(len(pieces[name]), sum(losses[name]), 0.0)
        architecture = SimpleNamespace(
            encode=lambda row, renderer, pieces=pieces: SimpleNamespace(
                completions=[pieces[row["id"]]], supervised=[[True] * len(pieces[row["id"]])]
            )
        )
        roles = SimpleNamespace(
            policy=SimpleNamespace(architecture=architecture),
            renderer=None,
            text=lambda tokens: b"".join(tokens).decode(),
        )
        rows = [{"id": name, "prompt": "", "completions": [text]} for name, text in texts.items()]
        made = build("evaluator", "bits_per_byte").summarize(stats, roles, rows, tmp_path, "after")
        found.append(made["bits_per_byte"])
    assert found[0] == found[1]
    total = sum(map(sum, losses.values()))
    assert found[0] == pytest.approx(total / math.log(2) / sum(len(text.encode()) for text in texts.values()))


@pytest.mark.long
def test_a_model_of_the_domain_needs_fewer_bits_for_it_than_one_of_mixed_texts(roles, tmp_path):
    """Two networks of one size and as many steps, one on programs alone, the other on programs and tales."""
    domain = [f"def f{i % 7}(x):\n    return x + {i % 5}\n" for i in range(35) if (i % 7, i % 5) != (3, 2)]
    tales = [
        f"{name} went to the {place} and was glad." for name in ("Ann", "Bo") for place in ("sea", "hill")
    ]
    found = {}
    for name, texts in (("domain", domain), ("mixed", [t for pair in zip(domain, tales * 9) for t in pair])):
        tuned = copy.copy(roles)
        net = make_llama(seed=1)
        tuned.policy = Policy(Causal(), net, Untuned(net))
        rows = [{"id": str(i), "prompt": "", "completions": [text]} for i, text in enumerate(texts)]
        adam = torch.optim.Adam(net.parameters(), lr=3e-3)
        for step in range(18):
            adam.zero_grad()
            some = [rows[(8 * step + k) % len(rows)] for k in range(8)]
            average(terms("sft"), tuned, tuned.batch(some)).backward()
            adam.step()
        new = [{"id": "n", "prompt": "", "completions": ["def f3(x):\n    return x + 2\n"]}]
        with torch.no_grad():
            measured = build("evaluator", "bits_per_byte").run(tuned, new, tmp_path, "after")
        found[name] = measured["bits_per_byte"]
    assert found["domain"] < 0.9 * found["mixed"], found
