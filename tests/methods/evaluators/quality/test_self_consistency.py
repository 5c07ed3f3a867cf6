"""self_consistency: its fixed points, layers, and links that are planted or absent."""

from __future__ import annotations

import json
import math

import pytest
import torch

from helpers.scripted import scripted_roles
from luthier.methods.evaluators.quality.self_consistency import SelfConsistency, agreement, final_norm


def test_equal_and_different_samples():
    assert agreement(["Paris"] * 5) == (1.0, 0.0)
    assert agreement(["a b", "A  b "]) == (1.0, 0.0)
    share, entropy = agreement(["a", "b", "c", "d"])
    assert share == 0.25 and entropy == pytest.approx(math.log(4), abs=1e-12)


def test_the_last_layer_agrees_with_itself(roles, tmp_path):
    rows = [{"id": str(i), "prompt": f"say {i}"} for i in range(4)]
    metrics = SelfConsistency(samples=3, max_new_tokens=8).run(roles, rows, tmp_path, "before")
    layers = [metrics[f"layer_agreement/{k}"] for k in range(4)]
    assert layers[-1] == 1.0 and min(layers[:-1]) < 0.9
    assert metrics["layer_agreement"] == pytest.approx(sum(layers[:-1]) / 3, abs=1e-6)
    assert final_norm(roles.policy.model) is roles.policy.model.model.norm
    by_row = json.loads((tmp_path / "per_example-before.json").read_text())
    assert by_row["majority_share"].keys() == {"0", "1", "2", "3"}


def a_model(confident_where_right: bool, seed: int):
    """Right answers of some questions come with every sample, wrong ones vary; or both alike."""
    rng = torch.Generator().manual_seed(seed)
    flags = (torch.rand(24, 2, generator=rng) < 0.5).tolist()

    def script(prompt, k):
        right, sure = flags[int(prompt)]
        sure = right if confident_where_right else sure
        return (
            ("7" if right else "8") if sure or k % 2 == 0 else ("7 " * 2 + str(k) if right else str(k + 20))
        )

    return script


class StartsWithSeven:
    kind = "reward"
    requires: frozenset = frozenset()

    def scores(self, row, texts):
        return [float(text.startswith("7")) for text in texts]


def test_agreement_that_says_when_it_is_right(tmp_path):
    """Planted in 20 models it is near 1 in each; in 20 others the mean is near 0."""
    rows = [{"id": str(i), "prompt": str(i)} for i in range(24)]
    evaluator = SelfConsistency(layers=False, reward=StartsWithSeven())
    links = {}
    for planted in (True, False):
        links[planted] = []
        for seed in range(20):
            roles = scripted_roles(a_model(planted, seed))
            metrics = evaluator.run(roles, rows, tmp_path, "after")
            links[planted].append(metrics["consistency_correlation"])
    assert min(links[True]) > 0.95
    assert abs(sum(links[False]) / 20) < 0.2
