"""update_sparsity: planted updates are read off exactly, and two runs' masks are compared with chance."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.stages import make_roles
from luthier.errors import RecipeError
from luthier.methods.evaluators.representation.update_sparsity import UpdateSparsity, packed, unpacked
from luthier.model.weight_changes import plain_matrices


def low_rank_and_sparse(shape, seed: int) -> torch.Tensor:
    """An update of rank 2 whose outer four fifths of rows are exactly 0."""
    rng = torch.Generator().manual_seed(seed)
    rows = round(0.2 * shape[0])
    update = torch.zeros(shape)
    update[:rows] = torch.randn(rows, 2, generator=rng) @ torch.randn(2, shape[1], generator=rng)
    return update


def tuned(folder, shallow, plant, **settings) -> dict[str, float]:
    """Metrics of a run whose whole tuning is `plant`: matrix, number of it -> its update."""
    folder.mkdir(parents=True, exist_ok=True)
    roles = make_roles(shallow)
    evaluator = UpdateSparsity(**settings)
    assert evaluator.run(roles, [], folder, "before") == {}
    with torch.no_grad():
        for k, matrix in enumerate(plain_matrices(roles.policy.model).values()):
            matrix += plant(matrix, k)
    return evaluator.run(roles, [], folder, "after")


def test_a_planted_update(shallow, tmp_path):
    """The share of zeros and the rank are those that were planted; of no update all is unchanged."""
    metrics = tuned(tmp_path / "run", shallow, lambda w, k: low_rank_and_sparse(w.shape, k))
    table = json.loads((tmp_path / "run" / "update-sparsity.json").read_text())
    shapes = {name: w.shape for name, w in plain_matrices(make_roles(shallow).policy.model).items()}
    for name, line in table.items():
        zeros = 1 - round(0.2 * shapes[name][0]) / shapes[name][0]
        assert line["equal_entries"] == pytest.approx(zeros, abs=1e-6)
        assert line["unchanged_entries"] == pytest.approx(zeros, abs=1e-3)
    entries = {name: shape.numel() for name, shape in shapes.items()}
    total = sum(table[name]["equal_entries"] * entries[name] for name in table) / sum(entries.values())
    assert metrics["equal_entries"] == pytest.approx(total)
    still = tuned(tmp_path / "still", shallow, lambda w, k: 0 * w)
    assert still == {"unchanged_entries": 1.0, "equal_entries": 1.0}
    tiny_moves = tuned(tmp_path / "moves", shallow, lambda w, k: torch.full_like(w, 5e-6))
    assert tiny_moves["unchanged_entries"] > 0.99 > 0.05 > tiny_moves["equal_entries"]


def test_the_rank_of_a_planted_update():
    before, update = torch.zeros(40, 30, dtype=torch.float64), low_rank_and_sparse((40, 30), 0)
    line = UpdateSparsity().of_matrix(before, update)
    assert line["equal_entries"] == pytest.approx(0.8)
    assert line["update_rank_ratio"] == pytest.approx(2 / 30)


def test_masks_of_two_runs(shallow, tmp_path):
    """The same entries moved: all; other rows: none; independent ones: chance."""

    def at_random(seed, share):
        def plant(w, k):
            rng = torch.Generator().manual_seed(100 * seed + k)
            return (torch.rand(w.shape, generator=rng) < share).float()

        return plant

    tuned(tmp_path / "one", shallow, at_random(1, 0.3))
    one = str(tmp_path / "one")
    same = tuned(tmp_path / "same", shallow, at_random(1, 0.3), other=one)
    assert same["update_overlap"] == 1.0
    assert same["update_overlap_chance"] == pytest.approx(0.3, abs=0.01)
    other = tuned(tmp_path / "other", shallow, at_random(2, 0.5), other=one)
    assert other["update_overlap"] == pytest.approx(other["update_overlap_chance"], abs=0.02)
    with pytest.raises(RecipeError, match="tune it with this evaluator"):
        tuned(tmp_path / "none", shallow, at_random(3, 0.5), other=str(tmp_path))


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 1)])
def test_masks_are_stored_in_bits(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpacked(packed(mask), mask.numel()), mask.flatten())
