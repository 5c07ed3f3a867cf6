"""domain_overlap: identities, masks by hand, and kinds that differ."""

from __future__ import annotations

import pytest
import torch

from luthier.methods.evaluators.representation.domain_overlap import DomainOverlap, iou, wanda_mask


def rows_of(source: str, texts: list[str]) -> list[dict]:
    return [
        {"id": f"{source}{i}", "prompt": "", "completions": [t], "source": source}
        for i, t in enumerate(texts)
    ]


WORDS = ["the cat sat", "a dog ran off", "birds sing songs", "the sun is up"]


def test_equal_kinds_and_random_masks(roles, tmp_path):
    rows = rows_of("one", WORDS) + rows_of("two", WORDS)
    metrics = DomainOverlap().run(roles, rows, tmp_path, "before")
    assert metrics["domain_alignment"] == pytest.approx(1.0) and metrics["domain_mask_overlap"] == 1.0
    assert metrics["domain_mask_chance"] == pytest.approx(1 / 3)
    assert {f"domain_alignment/{k}" for k in range(4)} < metrics.keys()
    for density in (0.5, 0.3):
        rng = torch.Generator().manual_seed(0)
        one, other = (torch.rand(300, 300, generator=rng) < density for _ in range(2))
        assert iou(one, other) == pytest.approx(density / (2 - density), abs=0.01)
    assert DomainOverlap().run(roles, rows_of("one", WORDS), tmp_path, "before") == {}


def test_masks_are_wandas():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [0.1, 0.1, -0.3, 0.2]])
    norms = torch.tensor([10.0, 1.0, 1.0, 1.0])
    mask = wanda_mask(weight, norms, 0.5)
    assert mask.tolist() == [[True, True, False, False], [True, False, True, False]]
    assert wanda_mask(weight, norms, 0.75).sum(1).tolist() == [1, 1]


def test_kinds_apart_are_less_alike(roles, tmp_path):
    """Digits against words are less alike than words against other words."""
    digits = ["12 34 56", "789 0 12", "3 3 3 44", "55 66 7"]
    others = ["a cat ran up", "the dog sat", "songs of birds", "a sun sets"]
    near = DomainOverlap().run(roles, rows_of("one", WORDS) + rows_of("two", others), tmp_path, "before")
    far = DomainOverlap().run(roles, rows_of("one", WORDS) + rows_of("two", digits), tmp_path, "before")
    for name in ("domain_alignment", "domain_mask_overlap"):
        assert far[name] < near[name] < 1
    assert near["domain_mask_overlap"] > near["domain_mask_chance"]
