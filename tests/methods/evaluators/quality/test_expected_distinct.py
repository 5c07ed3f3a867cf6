"""expected_distinct: the closed form, less dependence on length, and direction."""

from __future__ import annotations

import random

import pytest
import torch

from luthier.methods.evaluators.quality.expected_distinct import ExpectedDistinct, cosine_diversity, ead

ROWS = [{"id": str(i), "prompt": f"say {i}", "completions": ["x"]} for i in range(3)]


@pytest.mark.parametrize(
    ("texts", "distinct", "total"),
    [([[1, 2, 3]], 3, 3), ([[1, 1, 1, 1]], 1, 4), ([[1, 2], [2, 1], [3]], 3, 5)],
)
def test_the_closed_form(texts, distinct, total):
    expected = 10 * (1 - 0.9**total)
    assert ead(texts, 10, longest=1) == pytest.approx(distinct / expected, abs=1e-12)


def test_of_several_n_it_is_the_mean():
    one, two = 2 / (10 * (1 - 0.9**3)), 2 / (10 * (1 - 0.9**2))
    assert ead([[1, 2, 1]], 10, longest=2) == pytest.approx((one + two) / 2)
    assert ead([[]], 10) == 0.0


def test_length_matters_less_than_to_distinct_n():
    rng, size = random.Random(0), 200
    draw = lambda length: [[rng.randrange(size) for _ in range(length)] for _ in range(40)]
    short, long = draw(50), draw(500)
    values = [sum(ead([text], size, 1) for text in some) / 40 for some in (short, long)]
    plain = [sum(len(set(text)) / len(text) for text in some) / 40 for some in (short, long)]
    assert abs(values[0] - values[1]) < 0.05 < plain[0] - plain[1]


def test_equal_samples_and_a_low_temperature(tiny_roles, tmp_path):
    assert cosine_diversity(torch.full((4, 4), 0.5)) == pytest.approx(0, abs=1e-6)
    measure = {"samples": 4, "max_new_tokens": 12, "embeddings": True}
    warm = ExpectedDistinct(**measure).run(tiny_roles, ROWS, tmp_path, "before")
    cold = ExpectedDistinct(**measure, temperature=1e-4).run(tiny_roles, ROWS, tmp_path, "after")
    assert cold["ead_per_prompt"] < 0.6 * warm["ead_per_prompt"]
    assert cold["embedding_diversity"] == pytest.approx(0, abs=1e-4) and warm["embedding_diversity"] > 1e-3
    assert cold.keys() == {"ead_per_prompt", "ead_across_prompts", "embedding_diversity"}
