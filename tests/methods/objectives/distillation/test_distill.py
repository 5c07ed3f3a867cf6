"""distill: a network is no distance from itself; divergences by hand; the teachers top and the rest;
temperature keeps the size of gradients.
"""

from __future__ import annotations

import pytest
import torch

from helpers.objectives import V, by_hand, cast, full_logits, loss_of, network, pair_rows


@pytest.mark.parametrize("name", ["kl", "distill", "distill_reverse", "distill_jsd"])
def test_a_network_is_no_distance_from_itself(name):
    roles = cast(reference=network(), teacher=network())
    values = loss_of(name, roles)
    torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-6, rtol=0)


def test_divergences_by_hand():
    roles, rows = cast(), pair_rows()
    p, t, r = (full_logits(roles, n, rows).softmax(-1) for n in ("policy", "teacher", "reference"))
    m = 0.3 * t + 0.7 * p
    for spec, want in (
        ("kl", by_hand(p, r)),
        ("distill", by_hand(t, p)),
        ("distill_reverse", by_hand(p, t)),
        ({"name": "distill_jsd", "beta": 0.3}, 0.3 * by_hand(t, m) + 0.7 * by_hand(p, m)),
    ):
        torch.testing.assert_close(loss_of(spec, roles, rows).detach(), want, atol=1e-5, rtol=1e-4)


def test_the_teachers_top_and_the_rest():
    roles, rows = cast(), pair_rows()
    full = loss_of("distill", roles, rows)
    torch.testing.assert_close(loss_of({"name": "distill", "k": V}, roles, rows), full)
    by_k = [loss_of({"name": "distill", "k": k}, roles, rows) for k in (1, 5, V - 1)]
    torch.testing.assert_close(by_k[-1], full, atol=1e-5, rtol=1e-5)  # the rest is one token
    assert (by_k[0] <= by_k[1] + 1e-6).all() and (by_k[1] <= full + 1e-6).all(), (
        "merging outcomes loses information, never gains"
    )
    p, t = (full_logits(roles, n, rows).softmax(-1) for n in ("policy", "teacher"))
    top = t.argmax(-1, keepdim=True)
    a, b = t.gather(1, top), p.gather(1, top)
    torch.testing.assert_close(
        by_k[0].detach(), by_hand(torch.cat([a, 1 - a], 1), torch.cat([b, 1 - b], 1)), atol=1e-5, rtol=1e-4
    )


def test_temperature_keeps_the_size_of_gradients():
    roles, rows = cast(), pair_rows()
    p, t = (full_logits(roles, n, rows).div(3).softmax(-1) for n in ("policy", "teacher"))
    got = loss_of({"name": "distill", "temperature": 3.0}, roles, rows).detach()
    torch.testing.assert_close(got, 9 * by_hand(t, p), atol=1e-4, rtol=1e-4)
