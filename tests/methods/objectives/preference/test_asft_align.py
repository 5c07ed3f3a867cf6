"""asft_align: asft in closed form; asft and orpo without their second term are sft on the chosen."""

from __future__ import annotations

import pytest
import torch

from helpers.objectives import average, batch_of, cast, gradients, pair_rows, same
from luthier.registry import build


def test_asft_in_closed_form():
    """-log p_w - log(1 - p_l), each side by itself: no cross-derivative, unlike DPO."""
    made = build("objective", {"name": "asft_align", "beta": 1.0})
    w, x = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True)
        for v in ([-0.3, -2.0, -1e-4], [-0.01, -5.0, -0.7])
    )
    cost = made.pair(w, x)
    torch.testing.assert_close(cost, -w - (1 - x.exp()).log(), atol=1e-8, rtol=1e-8)
    (first,) = torch.autograd.grad(cost.sum(), w, create_graph=True)
    assert not first.requires_grad or not torch.autograd.grad(first.sum(), x, allow_unused=True)[0].any()
    (other,) = torch.autograd.grad(build("objective", "dpo").pair(w, x).sum(), w, create_graph=True)
    assert bool(torch.autograd.grad(other.sum(), x)[0].all())
    sure = torch.zeros(1, requires_grad=True)
    assert bool(made.pair(sure, sure).isfinite().all())


def test_asft_and_orpo_without_their_second_term_are_sft_on_the_chosen():
    for name in ("asft_align", "orpo"):
        found = []
        for objective in (
            build("objective", {"name": name, "beta": 1e-12}),
            build("objective", "chosen_sft"),
        ):
            roles = cast()
            value = average(objective, roles, batch_of(pair_rows()))
            value.backward()
            found.append((float(value.detach()), gradients(roles.policy.model)))
        assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
        same(found[0][1], found[1][1])
