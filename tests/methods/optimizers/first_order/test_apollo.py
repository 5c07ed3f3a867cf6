"""apollo: the formula by hand, Adam's scale at full rank, a small state, bounded growth."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from luthier.methods.transforms.projection.apollo import projection
from luthier.registry import build

NAME = "layers.0.up"


def updates(grads: list[torch.Tensor], state: dict | None = None, **settings) -> list[torch.Tensor]:
    method, state = build("transform", {"name": "apollo", **settings}), {} if state is None else state
    out = []
    for step, grad in enumerate(grads, 1):
        group = SimpleNamespace(name=NAME, params={"weight": torch.zeros_like(grad)})
        out.append(method.apply({"weight": grad}, state, group, step)["weight"])
    return out


def test_columns_are_scaled_as_adam_scales_the_projection():
    torch.manual_seed(0)
    G = torch.randn(6, 10)
    P = projection(f"{NAME}.weight", 0, 4, G)
    R = P @ G
    adam = R / (R.abs() + 1e-8)  # Adam's first step
    channel = G * adam.norm(dim=0) / R.norm(dim=0)
    state: dict = {}
    assert torch.allclose(updates([G], state, rank=4)[0], channel, atol=1e-5)
    assert torch.allclose(updates([G.T.contiguous()], rank=4)[0], channel.T, atol=1e-5)
    assert {k: tuple(v.shape) for k, v in state["weight"].items() if torch.is_tensor(v)} == {
        "m": (4, 10),
        "v": (4, 10),
    }
    mini = updates([G], rank=1, scale_type="tensor", scale=128.0)[0]
    R = projection(f"{NAME}.weight", 0, 1, G) @ G
    assert torch.allclose(mini, 128 * G * (10**0.5) / R.norm(), rtol=1e-4)


def test_what_is_not_projected_is_adam():
    G = torch.randn(3, 5)
    adam = build("transform", "adam")
    assert torch.equal(updates([G], rank=3)[0], adam.update(G, adam.init(G), G, 1))


def test_updates_grow_by_a_hundredth_at_most_and_projections_change():
    torch.manual_seed(0)
    G = torch.randn(6, 10)
    norms = [float(u.norm()) for u in updates([G, 100 * G, 100 * G], rank=4)]
    assert norms[1] <= 1.01 * norms[0] * (1 + 1e-5) and norms[2] <= 1.01 * norms[1] * (1 + 1e-5)
    one, other = (projection(NAME, turn, 2, G) for turn in (0, 1))
    assert not torch.equal(one, other) and torch.equal(one, projection(NAME, 0, 2, G))
    many = projection(NAME, 0, 4000, G)
    assert torch.allclose(many.T @ many, torch.eye(6), atol=0.15)  # lengths are preserved on average
