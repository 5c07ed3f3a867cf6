"""SetFit's pair loss: by hand, on rows held out, and before the heads of tasks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from helpers.objectives import batch_of, cast, fit, make_rows, network
from luthier.methods.objectives.representation.setfit import pair_losses
from luthier.registry import build


def test_the_loss_is_the_squared_errors_of_cosines():
    z = F.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    kinds = [0, 1, 0, 0, 2]
    values = pair_losses(z @ z.T, torch.tensor(kinds))
    for i in range(5):
        errors = {True: [], False: []}
        for j in range(5):
            if i != j:
                same = kinds[i] == kinds[j]
                errors[same].append((float(z[i] @ z[j]) - same) ** 2)
        means = [sum(e) / len(e) if e else 0.0 for e in errors.values()]
        assert float(values[i]) == pytest.approx(sum(means) / 2, abs=1e-6)
    alone = pair_losses(torch.ones(1, 1), torch.tensor([0]))
    assert alone.tolist() == [0.0]


def gap(roles, rows) -> float:
    """The mean cosine of two rows of one class, less that of two rows of different classes."""
    batch = batch_of(rows)
    with torch.no_grad():
        hidden = roles.policy.outputs(batch).hidden.float()
    z = F.normalize(hidden[batch.place == 0], dim=1)
    kinds = torch.tensor([row["completions"][0][0] for row in rows])
    same, own = kinds[:, None] == kinds, torch.eye(len(rows), dtype=torch.bool)
    near = z @ z.T
    return float(near[same & ~own].mean() - near[~same].mean())


@pytest.mark.parametrize("seed", range(2))
def test_cosines_of_rows_held_out_part_by_class(seed):
    """A class has words of its own; sixteen rows of each are learned, others measured."""
    rng = torch.Generator().manual_seed(seed)
    rows = make_rows(80, k=1, seed=seed)
    for i, row in enumerate(rows):
        words = torch.randint(6, (6,), generator=rng) + 8 + 10 * (i % 2)
        row |= {"id": f"c{i}", "prompt": words.tolist(), "completions": [[36 + i % 2]]}
    roles = cast()
    roles.policy.model = network(seed)
    before = gap(roles, rows[32:])
    fit(roles, build("objective", "setfit"), rows[:32], steps=60, size=24)
    after = gap(roles, rows[32:])
    assert after > before + 0.2, (before, after)
