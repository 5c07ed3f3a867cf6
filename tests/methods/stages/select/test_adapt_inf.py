"""adapt_inf: entropies, strata, pruning, and rows of several steps."""

from __future__ import annotations

import numpy as np
import torch

from luthier.methods.stages.select.adapt_inf import elbow, histogram_entropy, pruned, scorers, stratified
from luthier.methods.stages.select.kmq import budgets
from luthier.registry import build
from luthier.storage import files


def test_the_score_of_a_cluster_has_the_highest_entropy():
    rng = torch.Generator().manual_seed(0)
    flat, peaked = torch.rand(400, generator=rng), torch.randn(400, generator=rng) ** 5
    labels = torch.arange(400) % 2
    scores = {
        "a": torch.where(labels == 0, flat, peaked).double(),
        "b": torch.where(labels == 1, flat, peaked),
    }
    names = scorers({name: values.double() for name, values in scores.items()}, labels)
    assert names == ["a", "b"]
    for values in (flat, peaked):
        x = values.double().numpy()
        counts, _ = np.histogram(np.clip((x - x.mean()) / x.std(), -4, 4), 50, (-4, 4))
        p = counts[counts > 0] / counts.sum()
        assert abs(histogram_entropy(values.double()) + (p * np.log(p)).sum()) < 1e-6
    assert histogram_entropy(torch.ones(5)) == 0.0


def test_budgets_of_skills_add_up():
    sizes = torch.tensor([4.0, 50.0, 100.0, 9.0]).double()
    counts = budgets(torch.ones(4).double(), sizes, 60)
    assert sum(counts) == 60 and counts[0] == 4 and counts[3] == 9
    assert all(count <= size for count, size in zip(counts, sizes.tolist(), strict=True))


def test_strata_give_alike_and_tails_nothing():
    """Seven hundred equal scores and three hundred spread ones: the spread ones are not drowned."""
    scores = torch.cat([torch.full((700,), 0.5), torch.linspace(0, 1, 300)]).double()
    chosen = stratified(scores, 60, torch.Generator().manual_seed(0))
    assert len(chosen) == len({*chosen}) == 60
    assert sum(place >= 700 for place in chosen) > 40
    order = scores.argsort(stable=True)
    assert not {*chosen} & {*order[:50].tolist(), *order[-50:].tolist()}
    assert sorted(stratified(scores, 1000, torch.Generator().manual_seed(0))) == list(range(1000))


def test_copies_are_pruned_before_other_rows():
    rng = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(20, 6, generator=rng), dim=-1)
    vectors[[7, 12]] = vectors[[3, 5]]
    labels = torch.zeros(20).long()
    assert {*range(20)} - {*pruned(vectors, labels, 18)} == {7, 12}
    labels[7] = 1  # of another skill: no copy
    assert 12 not in pruned(vectors, labels, 19) and 7 in pruned(vectors, labels, 19)


def test_squares_bend_at_the_number_of_skills():
    rng = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(4).repeat_interleave(30, 0)
    assert elbow(centres + 0.1 * torch.randn(120, 4, generator=rng), [2, 4, 8, 16], rng) == 4


def test_rows_of_two_steps_make_one_choice(tiny_roles, tmp_path):
    pool = tmp_path / "pool.jsonl"
    stage = build(
        "stage",
        {"name": "adapt_inf", "n": 4, "clusters": 2, "dim": 32, "pool": str(pool), "pool_size": 5},
    )
    first = [{"id": str(i), "prompt": f"{i}+1=", "completions": [str(i + 1)]} for i in range(4)]
    second = [{"id": str(i), "prompt": f"say {i}", "completions": [f"{i}!"]} for i in range(4)]
    assert len(list(stage([*first, first[0]], tiny_roles))) == 4
    out = list(stage(second, tiny_roles))
    assert len(out) == 4 and len({row["id"] for row in out}) == 4
    assert sorted(out[0]) == ["cluster", "completions", "id", "prompt", "scorer"]
    assert len(files.read_rows(pool)) == 5
