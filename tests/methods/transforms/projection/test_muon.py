"""muon: singular values near one, torch's own step, Adam for all that is no matrix in a layer."""

from __future__ import annotations

import pytest
import torch

from luthier.methods.transforms.projection.muon import orthogonal
from luthier.methods.tuners._base import ParamGroup
from luthier.registry import build


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_the_step_has_the_same_directions_and_equal_lengths(shape):
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(*shape), full_matrices=False)
    M = U * torch.logspace(0, -1.5, 12 if 12 in shape else 16) @ Vh
    out = orthogonal(M, 5)
    values = torch.linalg.svdvals(out)
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3
    assert torch.allclose(U.T @ out @ Vh.T, torch.diag(torch.diagonal(U.T @ out @ Vh.T)), atol=1e-4)
    assert torch.equal(orthogonal(torch.zeros(3, 4), 5), torch.zeros(3, 4))


@pytest.mark.parametrize("scale, theirs", [("adamw", "match_rms_adamw"), ("shape", "original")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(scale, theirs, nesterov):
    """torch.optim.Muon computes in bf16, so the two differ by its rounding."""
    torch.manual_seed(0)
    grads, W = [torch.randn(12, 8) for _ in range(6)], torch.randn(12, 8)
    p = torch.nn.Parameter(W.clone())
    other = torch.optim.Muon(
        [p], lr=0.1, weight_decay=0.0, momentum=0.9, nesterov=nesterov, adjust_lr_fn=theirs
    )
    muon = build("transform", {"name": "muon", "muon_momentum": 0.9, "nesterov": nesterov, "scale": scale})
    state, group, ours = {}, ParamGroup("layers.0.w", {"weight": W}), W.clone()
    for step, g in enumerate(grads, 1):
        ours -= 0.1 * muon.apply({"weight": g}, state, group, step)["weight"]
        p.grad = g.clone()
        other.step()
        moved = (p.detach() - W).norm()
        assert float((ours - p.detach()).norm() / moved) < 0.03
    assert list(state) == ["momentum"] and state["momentum"]["weight"].shape == W.shape


def test_what_is_no_matrix_in_a_layer_goes_through_adam():
    torch.manual_seed(0)
    muon, adam = build("transform", "muon"), build("transform", "adam")
    for name, shape in (("lm_head", (4, 6)), ("layers.0.norm", (6,))):
        W = torch.randn(*shape)
        group, one, two = ParamGroup(name, {"weight": W}), {}, {}
        for step in range(1, 4):
            g = torch.randn(*shape)
            ours = muon.apply({"weight": g}, one, group, step)["weight"]
            assert torch.equal(ours, adam.apply({"weight": g}, two, group, step)["weight"])


def test_the_size_of_an_update_is_that_of_adamw():
    """Root mean square about 0.2, whatever the shape."""
    torch.manual_seed(0)
    muon = build("transform", "muon")
    for shape in ((64, 16), (16, 64), (48, 48)):
        group = ParamGroup("layers.0.w", {"weight": torch.zeros(shape)})
        update = muon.apply({"weight": torch.randn(shape)}, {}, group, 1)["weight"]
        assert 0.13 < float(update.square().mean().sqrt()) < 0.26


def test_the_optimizer_is_its_chain():
    chain = build("optimizer", {"name": "muon", "weight_decay": 0.1, "adam_beta2": 0.95}).chain()
    assert [t.name for t in chain] == ["clip", "muon", "weight_decay"]
    assert chain[1].inner[0].adam_beta2 == 0.95
