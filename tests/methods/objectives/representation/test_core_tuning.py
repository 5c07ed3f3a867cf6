"""core_tuning: contrast is supcon where every pair weighs alike; without weights is plain tuning; draws
classes together; dr tune and core tuning run.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.objectives import average, batch_of, cast, gradients, make_rows, network, tune_two_steps
from luthier.methods.objectives.representation.core_tuning import contrast
from luthier.registry import build


def test_contrast_is_supcon_where_every_pair_weighs_alike():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(8, 5))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    kinds = np.array([0, 0, 1, 1, 1, 2, 2, 0])
    by_hand = []
    for i in range(8):
        s = z @ z[i] / 0.1
        others = [j for j in range(8) if j != i]
        total = np.log(np.exp(s[others]).sum())
        by_hand.append(-np.mean([s[j] - total for j in others if kinds[j] == kinds[i]]))
    own = torch.eye(8, dtype=torch.bool)
    same = torch.tensor(kinds[:, None] == kinds) & ~own
    scores = torch.tensor(z @ z.T / 0.1).masked_fill(own, -torch.inf)
    torch.testing.assert_close(contrast(scores, same, False), torch.tensor(by_hand), atol=1e-5, rtol=1e-5)
    assert (contrast(scores, same, True) < contrast(scores, same, False)).all()


def test_core_tuning_without_weights_is_plain_tuning():
    rows = [{**r, "completions": [[5 + i % 2]]} for i, r in enumerate(make_rows(6, k=1))]
    found = []
    for spec in ("sft", [{"name": "sft"}, {"name": "core_tuning", "eta": 0.0, "boundary": 0.0}]):
        roles = cast()
        objective = (
            build("objective", spec)
            if isinstance(spec, str)
            else SimpleNamespace(terms=lambda spec=spec: [(1.0, build("objective", s)) for s in spec])
        )
        average(objective, roles, batch_of(rows)).backward()
        found.append(gradients(roles.policy.model))
    assert all(torch.equal(a, found[1][n]) for n, a in found[0].items())


@pytest.mark.slow
@pytest.mark.long
def test_core_tuning_draws_classes_together():
    rows = [
        {**r, "id": f"c{i}", "completions": [[5 + i % 2]]} for i, r in enumerate(make_rows(16, k=1, seed=3))
    ]

    def spread(seed: int, terms: list[dict]) -> float:
        roles = cast()
        roles.policy.model = net = network(seed)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        aims = SimpleNamespace(terms=lambda: [(1.0, build("objective", t)) for t in terms])
        for roles.clock.step in range(25):
            optimizer.zero_grad()
            average(aims, roles, batch_of(rows)).backward()
            optimizer.step()
        batch = batch_of(rows)
        with torch.no_grad():
            z = F.normalize(roles.policy.outputs(batch).hidden.float(), dim=1)
        kinds = torch.tensor([i % 2 for i in range(16)])
        gap, same = torch.cdist(z, z), kinds[:, None] == kinds
        return float(gap[same].sum() / (same.sum() - 16) / gap[~same].mean())

    for seed in range(3):
        assert spread(seed, [{"name": "sft"}, {"name": "core_tuning"}]) < spread(seed, [{"name": "sft"}])


@pytest.mark.slow
@pytest.mark.long
def test_dr_tune_and_core_tuning_run(tmp_path):
    common = dict(
        model="toy:lm-small",
        data={"path": "toy:topic", "n": 48},
        eval_data={"path": "toy:topic/test", "n": 24},
        max_steps=3,
    )
    report = tune_two_steps(
        tmp_path,
        "dr",
        objective="dr_tune",
        roles={"paired": {"name": "paired", "size": 32}},
        tuner={"name": "lora", "modules_to_save": ["lm_head"]},
        **common,
    )
    assert math.isfinite(report.losses[-1])
    assert math.isfinite(
        tune_two_steps(tmp_path, "core", objective="sft + core_tuning", tuner="lora", **common).losses[-1]
    )
    encoder = common | {"model": "toy:encoder", "architecture": "classifier", "tuner": "full"}
    assert math.isfinite(tune_two_steps(tmp_path, "c", objective="sft + core_tuning", **encoder).losses[-1])
    assert math.isfinite(
        tune_two_steps(tmp_path, "d", objective="dr_tune", roles={"paired": "paired"}, **encoder).losses[-1]
    )


def test_a_mixture_of_two_rows_of_one_class_is_no_negative(monkeypatch):
    """The semi-hard mixture of a row with one of its own class counts as a positive."""
    from luthier.methods.objectives.representation import core_tuning

    rows = [
        {**r, "id": f"c{i}", "completions": [[5 + i % 2]]} for i, r in enumerate(make_rows(16, k=1, seed=3))
    ]
    seen = []

    def contrast_of(scores, positive, focal):
        seen.append(positive)
        return contrast(scores, positive, focal)

    monkeypatch.setattr(core_tuning, "contrast", contrast_of)
    roles, batch = cast(), batch_of(rows)
    build("objective", "core_tuning").loss(roles, batch)
    order = torch.tensor([place for _, place in core_tuning.draws(batch, roles.clock, 1.0)]).argsort()
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    kinds = torch.tensor([i % 2 for i in range(16)])
    (positive,) = seen
    assert positive[:, -2].all() and torch.equal(positive[:, -1], kinds == kinds[other])
    assert 0 < int(positive[:, -1].sum()) < 16


def test_all_mixtures_are_compared_by_their_labels():
    """`pool: all` is the mean over each row's three features of SupCon over 3N features, equal mixed labels
    being alike.
    """
    from luthier.methods.objectives.representation.core_tuning import mixed_labels

    kinds, pure = torch.tensor([7, 9, 7, 9]), torch.tensor([True, False, False, True])
    labels = mixed_labels(kinds, pure)
    assert labels[:4].tolist() == [0, 1, 0, 1] and labels[8] == 0 and labels[11] == 1
    mixed = [4, 5, 6, 7, 9, 10]
    assert len({int(labels[i]) for i in mixed}) == 6 and all(labels[i] > 1 for i in mixed)
    z = F.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    made = build("objective", {"name": "core_tuning", "pool": "all", "temperature": 0.3, "focal": False})
    values = torch.zeros(3, 4).double()
    for i in range(12):
        others = [j for j in range(12) if j != i]
        total = (z[others] @ z[i] / 0.3).logsumexp(0)
        alike = [float(total - z[j] @ z[i] / 0.3) for j in others if labels[j] == labels[i]]
        values[i // 4, i % 4] = sum(alike) / max(len(alike), 1)
    expected = values.sum(0) / torch.tensor([2, 1, 1, 2])
    torch.testing.assert_close(made.all_pairs(z, labels), expected)
    rows = [{**r, "completions": [[5 + i % 2]]} for i, r in enumerate(make_rows(6, k=1))]
    loss = build("objective", {"name": "core_tuning", "pool": "all"}).loss(cast(), batch_of(rows))
    assert loss.shape == (6,) and bool((loss > 0).all())


def test_a_projection_head_trains_along():
    from luthier.methods.roles.networks.projection import PROJECTION, ProjectionHead

    rows = [{**r, "completions": [[5 + i % 2]]} for i, r in enumerate(make_rows(6, k=1))]
    torch.manual_seed(0)
    head = ProjectionHead(16, 8)
    made = build("objective", {"name": "core_tuning", "projected": True, "temperature": 0.07})
    assert PROJECTION in made.active_requires
    roles = cast(projection=head)
    made.loss(roles, batch_of(rows)).sum().backward()
    assert all(bool(p.grad.any()) for p in head.parameters())
    assert any(bool(g.any()) for g in gradients(roles.policy.model).values())
