"""virtual_adversarial: a term that is 0 without a radius, a change within it, worse than a random one."""

from __future__ import annotations

import pytest
import torch

import luthier
from helpers.objectives import batch_of, by_hand, cast, make_rows
from helpers.published import logged
from luthier.methods.objectives.supervised.virtual_adversarial import Change, distance_from
from luthier.registry import build


def loss_of(roles, batch, **settings):
    made = build("objective", {"name": "virtual_adversarial", **settings})
    return made.loss(roles, batch)


def test_the_term_is_zero_without_a_radius():
    roles, batch = cast(), batch_of(make_rows(3, k=1))
    sft = build("objective", "sft").loss(roles, batch)
    torch.testing.assert_close(loss_of(roles, batch, radius=0.0), sft, atol=1e-6, rtol=0)
    terms = []
    for radius in (0.01, 0.1):
        term = loss_of(roles, batch, radius=radius) - sft
        assert (term > -1e-6).all() and term.max() > 1e-5
        terms.append(float(term.detach().mean()))
    assert terms[1] > 5 * terms[0]
    assert torch.equal(loss_of(roles, batch), loss_of(roles, batch))


def test_the_change_is_within_the_radius():
    """The term is the symmetric KL of both predictions; no entry leaves the radius, and many are at it."""
    roles, batch = cast(), batch_of(make_rows(2, k=1))
    policy, change = roles.policy, Change(0.05, torch.Generator().manual_seed(0))
    plain = policy(batch)
    for _ in range(3):
        with change.applied(policy.model):
            other = policy(batch)
        change.ascend(other.apply(distance_from, beside=[plain]).sum())
    value, bound = change.values[0].detach(), change.bounds[0]
    assert (value.abs() <= bound * (1 + 1e-6)).all()
    reach = (value.abs() / bound).amax(-1)
    assert float(reach.max()) == pytest.approx(1.0)


def test_the_term_is_the_symmetric_divergence():
    roles, batch = cast(), batch_of(make_rows(2, k=1))
    policy, change = roles.policy, Change(0.05, roles.clock.rng("virtual_adversarial"))
    plain = policy(batch)
    with change.applied(policy.model):
        change.ascend(policy(batch).apply(distance_from, beside=[plain]).sum())
    with change.applied(policy.model), torch.no_grad():
        p, q = (one.apply(lambda z: z.softmax(-1)) for one in (plain, policy(batch)))
    expected = 2.0 * (by_hand(p, q) + by_hand(q, p)) / 2 - plain.logprobs
    torch.testing.assert_close(loss_of(roles, batch, weight=2.0, radius=0.05), expected, atol=1e-5, rtol=1e-4)


def test_an_ascent_moves_more_than_chance():
    """The change along the gradient moves predictions further than one of random signs."""
    roles, batch = cast(), batch_of(make_rows(4, k=1))
    policy, means = roles.policy, []
    plain = policy(batch)
    change = Change(0.05, torch.Generator().manual_seed(1))
    with change.applied(policy.model):
        distance = policy(batch).apply(distance_from, beside=[plain])
    change.ascend(distance.sum())
    chance = Change(0.05, torch.Generator())
    sign = torch.randn(change.values[0].shape, generator=torch.Generator().manual_seed(2)).sign()
    chance.values, chance.bounds = [change.values[0].detach().abs() * sign], change.bounds
    for some in (change, chance):
        with some.applied(policy.model), torch.no_grad():
            means.append(float(policy(batch).apply(distance_from, beside=[plain]).mean()))
    assert means[0] > 2 * means[1]


def test_weights_learn_through_both_passes():
    roles, batch = cast(), batch_of(make_rows(3, k=1))
    model = roles.policy.model.requires_grad_(True)
    grads = []
    for weight in (0.0, 5.0):
        model.zero_grad()
        loss_of(roles, batch, weight=weight, radius=0.1).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert grads[0].isfinite().all() and grads[1].isfinite().all()
    assert (grads[0] - grads[1]).norm() > 1e-3 * grads[0].norm()


@pytest.mark.parametrize("kind", ["classifier", "seq2seq"])
def test_other_networks_are_changed_too(kind, tmp_path):
    """A classifier, and an encoder-decoder whose two parts read one table."""
    rows = [{"text": f"{word} is it", "label": word} for word in ("day", "night")] * 4
    model = "toy:seq2seq"
    if kind == "classifier":
        model = "toy:encoder"
    objective = {"name": "virtual_adversarial", "radius": 0.05, "steps": 2}
    report = luthier.tune(
        model=model,
        architecture=kind,
        data=rows,
        eval_data=0,
        evaluate=[],
        objective=objective,
        tuner="full",
        max_steps=2,
        output_dir=str(tmp_path / "run"),
    )
    assert all(value > 0 for value in logged(report.folder, "divergence"))
