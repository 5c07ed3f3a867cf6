"""Schedules are those of transformers, step by step."""

from __future__ import annotations

import pytest
import torch
from transformers.optimization import get_scheduler

from luthier.errors import RecipeError
from luthier.recipe.schedule import schedule

STEPS = 20


@pytest.mark.parametrize(
    "name, settings, theirs",
    [
        ("constant", {}, None),
        ("linear", {}, None),
        ("cosine", {}, None),
        ("cosine_with_restarts", {"num_cycles": 3}, None),
        ("polynomial", {"power": 2.0, "lr_end": 1e-5}, None),
        ("cosine_with_min_lr", {"min_lr": 2e-5}, None),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, None),
        (
            "warmup_stable_decay",
            {"decay_ratio": 0.5},
            {"num_decay_steps": 10, "decay_type": "linear"},
        ),
        (
            "warmup_stable_decay",
            {"decay_ratio": 0.5, "decay_type": "cosine", "min_lr_ratio": 0.2},
            {"num_decay_steps": 10, "decay_type": "cosine", "min_lr_ratio": 0.2},
        ),
    ],
)
def test_the_factor_is_that_of_transformers(name, settings, theirs):
    rate = 1e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    kwargs = settings if theirs is None else theirs
    other = get_scheduler(name, optimizer, 0, STEPS, scheduler_specific_kwargs=kwargs)
    factor = schedule(name, 0, STEPS, settings, rate)
    for step in range(STEPS):
        assert factor(step) * rate == pytest.approx(other.get_last_lr()[0], rel=1e-6, abs=1e-12)
        optimizer.step()
        other.step()


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("cosin", {}, "did you mean 'cosine'"),
        ("linear", {"power": 2}, "has no setting power"),
        ("cosine_with_min_lr", {}, "requires min_lr"),
        ("polynomial", {"power": "two"}, "must be a number"),
        ("polynomial", {"lr_end": -1}, "must be a learning rate"),
        ("warmup_stable_decay", {"decay_type": "square"}, "decay_type must be one of"),
    ],
)
def test_what_no_schedule_has_is_refused(name, settings, words):
    with pytest.raises(RecipeError, match=words):
        schedule(name, 0, STEPS, settings, 1e-3)
