"""owlore: draws by outliers; density is its formula; forgets frozen layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.subset_tuners import ROWS, base, put, roles_of, train
from luthier.clock import Clock
from luthier.model.anatomy import layer_of


@pytest.mark.long
def test_owlore_draws_by_outliers():
    model = base()
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[:, 3] = 9.0  # planted
    attached = put("owlore", model, n_layers=2, interval=1, outlier_ratio=8, init_rows=2)
    assert torch.allclose(attached.p, torch.full((4,), 0.25))
    attached.initialize(ROWS, roles_of(attached))
    assert int(attached.p.argmax()) == 2 and abs(float(attached.p.sum()) - 1) < 1e-6
    attached.p.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    counts, wanted, rng = np.zeros(4), np.zeros(4), np.random.default_rng(0)
    for step in range(4000):
        counts[attached.drawn(Clock(seed=0).rng("owlore", at=step))] += 1
        wanted[rng.choice(4, 2, replace=False, p=[0.1, 0.2, 0.3, 0.4])] += 1
    assert np.abs(counts - wanted).max() / 4000 < 4 * (2 * 0.25 / 4000) ** 0.5
    reverse = put("owlore", model, prob_mode="owl_reverse", outlier_ratio=8, init_rows=2)
    reverse.initialize(ROWS, roles_of(reverse))
    assert int(reverse.p.argmin()) == 2
    assert (
        put("owlore", prob_mode="increasing").p.diff().gt(0).all()
        and put("owlore", prob_mode="decreasing").p.diff().lt(0).all()
    )


def test_owlore_density_is_its_formula():
    attached = put("owlore", outlier_ratio=2.0)
    W, norms = attached.model.model.layers[1].mlp.up_proj.weight, torch.rand(32)
    A = (W.abs() * norms).detach()
    D = attached.density({"model.layers.1.mlp.up_proj": (W, norms)})
    assert abs(float(D[1]) - float((A > 2 * A.mean()).float().mean())) < 1e-7 and D[0] == D[2] == D[3] == 0


def test_owlore_forgets_frozen_layers():
    attached = put("owlore", n_layers=1, interval=1)
    for step in range(4):
        before = attached.tensors()
        chain = train(attached, step + 1, first=step, total=4, transform={"name": "galore", "rank": 4})
        moved = {
            layer_of(k)
            for k, v in attached.tensors().items()
            if layer_of(k) and not torch.equal(v, before[k])
        }
        assert len(moved) == 1 and {layer_of(n) for n in chain.state if layer_of(n)} == moved
