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
