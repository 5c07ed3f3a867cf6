"""memory: a memory renews its rows and lets the oldest go."""

from __future__ import annotations

import pytest
import torch

from luthier.errors import RecipeError
from luthier.methods.roles.features.memory import Features


def test_a_memory_renews_its_rows_and_lets_the_oldest_go():
    memory = Features(3, 2)
    say = lambda rows, x: memory.remember(
        torch.tensor(rows), torch.tensor(rows) + 10, torch.full((len(rows), 2), float(x))
    )
    say([1, 2], 1)
    assert memory.count == 0, "what is said in a step is seen from the next one on"
    say([1, 2], 2)
    memory.after_step(None)
    assert memory.count == 2 and memory.features[:2].eq(2).all() and memory.classes[:2].tolist() == [11, 12]
    say([2, 3, 4], 3)
    memory.after_step(None)
    assert memory.rows.tolist() == [4, 2, 3] and memory.features.eq(3).all()
    with pytest.raises(RecipeError, match="width 2"):
        memory.remember(torch.tensor([1]), torch.tensor([1]), torch.ones(1, 5))
