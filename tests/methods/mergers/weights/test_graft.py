"""graft: both ends, the mask by magnitude, a planted skill, and the overlap of masks."""

from __future__ import annotations

import pytest
import torch

from luthier.errors import RecipeError
from luthier.methods.mergers.weights.graft import largest_changes, overlap
from luthier.registry import build


def tensors(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    names = ["embed.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3))]
    return {name: scale * torch.randn(20, 10, generator=rng) for name in names}


BASE, ONE, OTHER = tensors(0), tensors(1), tensors(2)


def graft(*several, base=BASE, **settings):
    return build("merger", {"name": "graft", **settings}).merge(list(several), base)


def same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


def test_both_ends_bit_for_bit():
    assert same(graft(ONE, share=1.0, embeddings=True), ONE)
    assert same(graft(ONE, share=0.0), BASE)
    assert torch.equal(graft(ONE, share=1.0)["embed.weight"], BASE["embed.weight"])
    assert same(graft(BASE, share=0.5), BASE)
    with pytest.raises(RecipeError, match="needs the base"):
        graft(ONE, base=None)


def test_the_mask_is_the_largest_changes_of_all():
    names = [name for name in BASE if "embed" not in name]
    every = torch.cat([(ONE[name] - BASE[name]).abs().flatten() for name in names])
    level = every.sort(descending=True).values[round(0.1 * len(every)) - 1]
    merged = graft(ONE, share=0.1)
    for name in names:
        inside = (ONE[name] - BASE[name]).abs() >= level
        assert torch.equal(merged[name], torch.where(inside, ONE[name], BASE[name]))


def test_a_planted_skill_comes_with_few_entries():
    """A task that two entries in a hundred solve, amid small changes everywhere."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 50, generator=rng)
    base = {"w": torch.zeros(1, 50)}
    skill = torch.zeros(1, 50)
    skill[0, 17] = 3.0
    y = (x @ skill.T > 0).float()
    tuned = {"w": skill + 0.05 * torch.randn(1, 50, generator=rng)}
    accuracy = lambda w: float((((x @ w["w"].T) > 0).float() == y).float().mean())
    gain = accuracy(tuned) - accuracy(base)
    assert accuracy(graft(tuned, base=base, share=0.02)) - accuracy(base) > 0.9 * gain > 0.3
    at_random = []
    for k in range(50):
        mask = torch.zeros(1, 50, dtype=torch.bool)
        mask[0, k] = True
        at_random.append(accuracy({"w": torch.where(mask, tuned["w"], base["w"])}) - accuracy(base))
    assert sorted(at_random)[45] < 0.5 * gain


def test_masks_of_two_tasks():
    """Of independent changes the overlap is chance, of the same ones all; a union holds both skills."""
    one, other = (largest_changes(run, BASE, 0.2) for run in (tensors(1, 5), tensors(2, 5)))
    assert overlap(one, other) == pytest.approx(0.2, abs=0.06) and overlap(one, one) == 1.0
    apart = [{"w": torch.tensor([[3.0, 0.1, 0.0, 2.0]])}, {"w": torch.tensor([[0.0, 0.1, 5.0, 4.0]])}]
    merged = graft(*apart, base={"w": torch.zeros(1, 4)}, share=0.5)
    assert torch.equal(merged["w"], torch.tensor([[3.0, 0.0, 5.0, 3.0]]))
