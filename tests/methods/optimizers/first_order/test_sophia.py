"""Sophia: its step, the curvature of drawn labels, and a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import luthier
from helpers.objectives import batch_of, cast, make_rows
from luthier.methods.estimators.first_order.gauss_newton import DrawnLabels
from luthier.methods.tuners._base import ParamGroup
from luthier.registry import build


def test_the_step_by_hand():
    step: Any = build("transform", {"name": "sophia", "beta1": 0.9, "gamma": 0.5})
    p = torch.nn.Parameter(torch.zeros(4))
    group, state = ParamGroup("w", {"weight": p}), {}
    grads = torch.tensor([1.0, -2.0, 3.0, -4.0])
    first = step.apply({"weight": grads}, state, group, 1)["weight"]
    assert torch.equal(first, grads.sign())  # no curvature is known
    state["weight"]["h"].copy_(torch.tensor([4.0, 4.0, 0.0, 0.1]))
    second = step.apply({"weight": grads}, state, group, 2)["weight"]
    m = 0.9 * 0.1 * grads + 0.1 * grads
    assert torch.allclose(second, torch.stack([m[0] / 2, m[1] / 2, m[2].sign(), m[3].sign()]))


def test_drawn_labels_measure_the_gauss_newton_diagonal():
    """Of the output layer: B g^2 over many draws against the mean of p (1 - p) x^2 over tokens."""
    roles, rows = cast(), make_rows(4, k=1)
    batch = batch_of(rows)
    head: Any = roles.policy.model.lm_head.weight
    with torch.no_grad():
        x = roles.policy.outputs(batch).hidden.float()
        p = (x @ head.T).softmax(-1)
    diagonal = (p * (1 - p)).T @ x.square() / len(x)
    measured, draws = torch.zeros_like(diagonal), 400
    for roles.clock.step in range(draws):
        values = DrawnLabels().loss(roles, batch_of(rows))
        (g,) = torch.autograd.grad(values.mean(), head)
        measured += len(values) * g.square() / draws
    assert float(measured.sum() / diagonal.sum()) == pytest.approx(1, abs=0.15)
    both = torch.stack([measured.flatten(), diagonal.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.9


@pytest.mark.long
def test_a_run_learns_with_measured_curvature(tmp_path):
    recipe: Any = {"model": "toy:lm-small", "data": {"path": "toy:topic", "n": 64}, "tuner": "lora"}
    recipe |= {"optim": "sophia", "learning_rate": 1e-3, "max_steps": 20, "evaluate": [], "eval_data": 0}
    runs = {}
    for name, spec in (("measured", {"name": "gauss_newton", "every": 5}), ("plain", "backprop")):
        folder = str(tmp_path / name)
        runs[name] = luthier.tune(**recipe, estimator=spec, output_dir=folder).losses
    assert sum(runs["measured"][-4:]) < 0.9 * sum(runs["measured"][:4])
    assert runs["measured"] != runs["plain"]
