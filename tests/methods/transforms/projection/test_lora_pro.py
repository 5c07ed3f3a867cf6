"""lora_pro: the nearest steps of A and B, by numpy and by scipy; falls below LoRA; Adam at full size."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from scipy.linalg import solve_sylvester
from torch import nn

from helpers.subset_tuners import put, train
from luthier.methods.transforms.projection.lora_pro import moved, nearest, sylvester
from luthier.methods.tuners._base import ParamGroup
from luthier.registry import build

SCALE = 1.7


def problem(seed: int = 0, out: int = 6, inner: int = 5, r: int = 2):
    """A, B and the gradient of the whole weight, in fp64."""
    torch.manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    return draw(r, inner), draw(out, r), draw(out, inner)


def own(A, B, G):
    """LoRA's gradients."""
    return SCALE * B.T @ G, SCALE * G @ A.T


def test_the_weight_moves_as_near_to_its_gradient_as_can_be():
    """The least squares optimum over all (dA, dB), as numpy finds it; LoRA's own steps are further away."""
    for seed in range(3):
        A, B, G = problem(seed)
        out, inner = G.shape
        columns = [
            *(moved(A, B, e.view_as(A), torch.zeros_like(B), SCALE) for e in torch.eye(A.numel()).double()),
            *(moved(A, B, torch.zeros_like(A), e.view_as(B), SCALE) for e in torch.eye(B.numel()).double()),
        ]
        M = torch.stack([c.flatten() for c in columns], 1).numpy()
        best = M @ np.linalg.lstsq(M, G.flatten().numpy(), rcond=None)[0] - G.flatten().numpy()
        ours = torch.linalg.norm(moved(A, B, *nearest(A, B, *own(A, B, G), SCALE), SCALE) - G)
        assert abs(float(ours) - np.linalg.norm(best)) < 1e-4
        loras = moved(A, B, *own(A, B, G), SCALE)
        fitted = loras * float((loras * G).sum() / loras.square().sum())  # at its best learning rate
        assert ours < torch.linalg.norm(fitted - G) - 1e-3


def test_x_solves_its_equation_and_moves_nothing():
    A, B, G = problem()
    gA, gB = own(A, B, G)
    C = -torch.linalg.solve(B.T @ B, gA) @ A.T / SCALE**2
    X = sylvester(B.T @ B, A @ A.T, C)
    assert torch.allclose(B.T @ B @ X + X @ A @ A.T, C, atol=1e-8)
    want = solve_sylvester((B.T @ B).numpy(), (A @ A.T).numpy(), C.numpy())
    assert np.allclose(X.numpy(), want, atol=1e-6)
    dA, dB = nearest(A, B, gA, gB, SCALE)
    other = torch.randn(2, 2, dtype=torch.float64)
    moved_more = moved(A, B, dA + other @ A, dB - B @ other, SCALE)
    assert torch.allclose(moved_more, moved(A, B, dA, dB, SCALE))
    distance = lambda a, b: float((a - gA).square().sum() + (b - gB).square().sum())
    for seed in range(20):  # of all steps that move the weight alike, ours are the nearest to LoRA's own
        torch.manual_seed(seed)
        D = 0.1 * torch.randn(2, 2, dtype=torch.float64)
        assert distance(dA + D @ A, dB - B @ D) > distance(dA, dB)


def test_at_the_start_only_b_moves_the_weight():
    A, B, G = problem()
    B = torch.zeros_like(B)
    gA, gB = own(A, B, G)
    dA, dB = nearest(A, B, gA, gB, SCALE)
    assert torch.equal(dA, gA)
    P = A.T @ torch.linalg.solve(A @ A.T, A)
    assert torch.allclose(moved(A, B, dA, dB, SCALE), G @ P, atol=1e-6)


def lora(A, B):
    """A group with a LoRA of this scale, and something that says so."""
    layer = SimpleNamespace(scaling={"default": SCALE}, get_base_layer=lambda: nn.Linear(2, 2))
    return ParamGroup("w", {"A": A, "B": B}), SimpleNamespace(layers={"w": layer})


def regression(seed: int, rate: float, pro: bool, steps: int = 60) -> list[float]:
    """Losses of LoRA on a linear task whose solution has one large and one small direction."""
    torch.manual_seed(seed)
    X, U, V = torch.randn(64, 8), torch.linalg.qr(torch.randn(6, 2))[0], torch.linalg.qr(torch.randn(8, 2))[0]
    W = U * torch.tensor([4.0, 0.4]) @ V.T
    group, attached = lora(torch.randn(2, 8) * 0.3, torch.zeros(6, 2))
    A, B = group.params["A"], group.params["B"]
    transform = build("transform", {"name": "lora_pro", "inner": []}).bind(attached)
    losses = []
    for step in range(steps):
        error = X @ (SCALE * B @ A - W).T
        losses.append(float(error.square().mean()))
        G = error.T @ X * 2 / error.numel()
        updates = {"A": SCALE * B.T @ G, "B": SCALE * G @ A.T}
        if pro:
            updates = transform.apply(updates, {}, group, step + 1)
        A -= rate * updates["A"]
        B -= rate * updates["B"]
    return losses


def test_sgd_falls_at_each_step_and_below_loras():
    """At every rate tried it falls all the way; LoRA at its best rate stays far above."""
    for seed in range(3):
        best = min(regression(seed, rate, pro=False)[-1] for rate in (0.03, 0.1, 0.2, 0.3))
        for rate in (0.1, 0.3, 1.0):
            losses = regression(seed, rate, pro=True)
            assert all(b < a + 1e-6 for a, b in zip(losses, losses[1:], strict=False))
        assert losses[-1] < 0.1 * best


def test_adam_is_that_of_the_whole_weight():
    """The nearest gradient goes through Adam at full size; its step is projected by the same formulas."""
    torch.manual_seed(0)
    A, B = torch.randn(2, 5), torch.randn(6, 2)
    group, attached = lora(A, B)
    pro = build("transform", "lora_pro").bind(attached)
    state, m, v = {}, torch.zeros(6, 5), torch.zeros(6, 5)
    for step in range(1, 4):
        G = torch.randn(6, 5)
        gA, gB = SCALE * B.T @ G, SCALE * G @ A.T
        updates = pro.apply({"A": gA, "B": gB}, state, group, step)
        whole = moved(A, B, *nearest(A, B, gA, gB, SCALE), SCALE)
        m, v = 0.9 * m + 0.1 * whole, 0.999 * v + 0.001 * whole**2
        D = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        want = nearest(A, B, SCALE * B.T @ D, SCALE * D @ A.T, SCALE)
        assert torch.allclose(updates["A"], want[0], atol=1e-4)
        assert torch.allclose(updates["B"], want[1], atol=1e-4)


def test_it_finds_the_scale_of_loras_on_a_model():
    one = put("lora")
    train(one, 3, transform={"name": "lora_pro", "inner": []})
    two = put("lora")
    chain = train(two, 3, transform="lora_pro")
    name = next(iter(two.layers))
    whole = chain.state[name]["0"]["0"]["weight"]["m"]
    base = two.layers[name].get_base_layer().weight
    assert whole.shape == base.shape
