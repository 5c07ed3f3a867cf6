"""ViLD-image: the distance by hand, and vectors of another space."""

from __future__ import annotations

import pytest
import torch

from helpers.objectives import batch_of, cast, contract_rows
from luthier.errors import RecipeError
from luthier.registry import build


@torch.no_grad()
def test_the_loss_is_the_l1_distance_of_directions():
    objective, roles = build("objective", "vild"), cast()
    rows = contract_rows(objective)
    batch = batch_of(rows)
    values = objective.loss(roles, batch)
    outputs = roles.policy.outputs(batch)
    first = outputs.hidden[batch.place == 0]
    for value, state, group in zip(values, first, objective.rows_of_units(batch).tolist(), strict=True):
        vector = torch.tensor(rows[group]["region_embedding"])
        expected = (state / state.norm() - vector / vector.norm()).abs().sum()
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def test_vectors_of_another_space_are_refused():
    objective = build("objective", "vild")
    rows = [{**row, "region_embedding": [1.0, 0.0]} for row in contract_rows(objective)]
    with pytest.raises(RecipeError, match="of 2 numbers"):
        objective.loss(cast(), batch_of(rows))
