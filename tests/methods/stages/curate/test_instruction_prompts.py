"""instruction_prompts: bins round-trip, the share of prompts with examples, options of two classes."""

from __future__ import annotations

import pytest
import torch

from helpers.synthesis import nobody
from luthier.methods.stages.curate.instruction_prompts import decode, encode
from luthier.registry import build


def made(rows, **settings):
    return list(build("stage", {"name": "instruction_prompts", **settings})(rows, nobody()))


def test_bins_are_decoded_within_half_a_bin():
    values = (torch.rand(500, generator=torch.Generator().manual_seed(0)) * 9 - 4).tolist()
    low, high = min(values), max(values)
    for value in values:
        number = encode(value, low, high, 1000)
        assert 0 <= number <= 1000
        assert abs(decode(number, low, high, 1000) - value) <= (high - low) / 2000 * (1 + 1e-6)
    assert encode(low - 1, low, high, 10) == 0 and encode(high + 1, low, high, 10) == 10
    rows = [{"id": str(k), "prompt": f"CC{k}", "completions": [f"{v}"]} for k, v in enumerate(values[:50])]
    out = made(rows)
    assert all(0 <= int(row["completions"][0]) <= 1000 and row["low"] < row["high"] for row in out)


def test_the_share_of_prompts_with_examples():
    rows = [{"id": str(k), "prompt": f"q{k}", "completions": [f"a{k % 7}"]} for k in range(3000)]
    out = made(rows, shots=4)
    counts = [row["prompt"].count("Question:") - 1 for row in out]
    assert sum(count > 0 for count in counts) / len(out) == pytest.approx(0.3, abs=0.03)
    assert {*counts} == {0, 1, 2, 3, 4}
    for k, row in enumerate(out):
        assert row["prompt"].count(f"Question: q{k}\n") == 1 and row["prompt"].endswith(f"q{k}\nAnswer: ")


def test_two_classes_are_options():
    rows = []
    for k in range(20):
        row = {"id": str(k), "prompt": f"C{k}", "completions": [["toxic", "safe"][k % 2]], "source": "tox"}
        rows.append({**row, "context": "Some molecules do harm."})
    rows.append({"id": "x", "prompt": "CC>>?", "completions": ["CCO"], "source": "reactions"})
    out = made(rows, few_shot=1.0)
    assert [row["completions"][0] for row in out[:2]] == ["(B)", "(A)"] and out[-1]["completions"] == ["CCO"]
    assert "(A) safe (B) toxic\nAnswer: (" in out[0]["prompt"] and "Context: Some" in out[0]["prompt"]
    assert "(A)" not in out[-1]["prompt"]
