"""dct_adam: orthogonal cosines, the best columns, Adam at full rank, error feedback, a small state."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import scipy.fft
import torch

from luthier.methods.transforms.projection.dct_adam import by_fft, cosines, transformed
from luthier.methods.tuners._base import ParamGroup
from luthier.registry import build

CPU = torch.device("cpu")


def stepped(grads, name="layers.0.w", **settings):
    """Updates and state of a matrix under these gradients."""
    transform, state = build("transform", {"name": "dct_adam", **settings}), {}
    group = ParamGroup(name, {"weight": torch.zeros_like(grads[0])})
    updates = [transform.apply({"weight": g}, state, group, i + 1)["weight"] for i, g in enumerate(grads)]
    return updates, state["weight"]


def draws(count, *shape):
    torch.manual_seed(0)
    return [torch.randn(*shape) for _ in range(count)]


@pytest.mark.parametrize("n", [1, 7, 8, 33])
def test_the_cosines_are_orthogonal_and_scipys(n):
    Q = cosines(n, CPU, torch.float64)
    assert torch.allclose(Q.T @ Q, torch.eye(n, dtype=torch.float64), atol=1e-6)
    G = draws(1, 5, n)[0]
    want = scipy.fft.dct(G.numpy(), norm="ortho", axis=1)
    assert np.allclose(transformed(G).numpy(), want, atol=1e-4)
    assert torch.allclose(by_fft(G), transformed(G), atol=1e-4)


def test_columns_of_the_largest_norm_are_the_best_choice():
    """By L2 norm, no other three columns of eight leave less of the gradient behind."""
    G = draws(1, 12, 8)[0]
    _, state = stepped([G], rank=3, ranking="l2")
    Q = cosines(8, CPU, torch.float32)

    def left(columns):
        basis = Q[:, list(columns)]
        return float((G - G @ basis @ basis.T).square().sum())

    least = min(left(columns) for columns in combinations(range(8), 3))
    assert left(state["columns"].tolist()) == pytest.approx(least, rel=1e-5)
    assert stepped([G], rank=3, ranking="l1")[1]["columns"].shape == (3,)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_full_rank_is_adam_in_the_rotated_basis(shape):
    """One column short of it the projection loses what lies in that column and nothing else."""
    grads = draws(4, *shape)
    ours, _ = stepped(grads, rank=5)
    Q = cosines(6, CPU, torch.float32)
    turn = lambda g: (g if shape[0] > shape[1] else g.T) @ Q
    assert torch.allclose(turn(grads[0]) @ Q.T, grads[0] if shape[0] > shape[1] else grads[0].T, atol=1e-5)
    m, v = torch.zeros(9, 6), torch.zeros(9, 6)
    columns = None
    for step, g in enumerate(grads, 1):
        S = turn(g)
        order = S.abs().sum(0).argsort(descending=True)[:5]
        mask = torch.zeros(6).index_fill_(0, order, 1.0)
        if columns is not None:
            m, v = m * columns, v * columns  # what is left out forgets
        columns = mask
        m, v = mask * (0.9 * m + 0.1 * S), mask * (0.999 * v + 0.001 * S**2)
        direction = mask * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        want = direction @ Q.T
        assert torch.allclose(ours[step - 1], want if shape[0] > shape[1] else want.T, atol=1e-4)


def test_moments_go_on_where_columns_stay():
    Q = cosines(6, CPU, torch.float32)
    one, two = torch.zeros(8, 6), torch.zeros(8, 6)
    one[:, [0, 1]], two[:, [1, 4]] = 1.0, 2.0
    _, state = stepped([one @ Q.T, two @ Q.T], rank=2)
    assert state["columns"].tolist() == [1, 4]
    assert torch.allclose(state["m"][:, 0], torch.tensor(0.9 * 0.1 + 0.1 * 2), atol=1e-6)
    assert torch.allclose(state["m"][:, 1], torch.tensor(0.1 * 2), atol=1e-6)
    _, fixed = stepped([one @ Q.T, two @ Q.T], rank=2, update_proj_gap=2)
    assert fixed["columns"].tolist() == [0, 1]


def test_error_feedback_loses_nothing():
    """What the projections so far have let through and the error add up to the sum of the gradients."""
    grads = draws(12, 8, 6)
    transform, state = build("transform", {"name": "dct_adam", "rank": 2, "error_feedback": True}), {}
    group = ParamGroup("layers.0.w", {"weight": torch.zeros(8, 6)})
    through, total = torch.zeros(8, 6), torch.zeros(8, 6)
    for step, g in enumerate(grads, 1):
        before = state.get("weight", {}).get("error", torch.zeros(8, 6))
        transform.apply({"weight": g}, state, group, step)
        own, total = state["weight"], total + g
        basis = cosines(6, CPU, torch.float32)[:, own["columns"].long()]
        through += (g + before) @ basis @ basis.T
        assert torch.allclose(through + own["error"], total, atol=1e-4)
    assert float(own["error"].norm()) < 0.8 * float(total.norm()) + 12  # it does not grow without end


def test_the_state_is_two_tall_matrices_and_indices():
    _, state = stepped(draws(1, 40, 12), rank=4)
    tensors = {k: t for k, t in state.items() if torch.is_tensor(t)}
    assert sum(t.nbytes for t in tensors.values()) == 2 * 40 * 4 * 4 + 4 * 4
    for name in ("lm_head", "layers.0.w"):  # outside of layers, and no larger than the rank: Adam
        rank = 4 if name == "lm_head" else 12
        updates, state = stepped(draws(1, 40, 12), name=name, rank=rank)
        assert state["m"].shape == (40, 12)
        assert torch.allclose(updates[0], draws(1, 40, 12)[0].sign(), atol=1e-4)


def test_the_optimizer_is_its_chain():
    chain = build("optimizer", {"name": "dct_adamw", "rank": 7, "weight_decay": 0.1}).chain()
    assert [t.name for t in chain] == ["clip", "dct_adam", "weight_decay"]
    assert chain[1].rank == 7 and chain[2].weight_decay == 0.1
