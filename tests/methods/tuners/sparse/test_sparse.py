"""sparse: a sparse product and its gradients; deltas add up; a planted sparse part is found; places are
drawn and found without all of a weight.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from helpers.tuners import base, plain, train
from luthier.methods.tuners.sparse._sparse import add, greatest, some_of, spread
from luthier.registry import build


def test_a_sparse_product_and_its_gradients():
    torch.manual_seed(0)
    x, y, indices = (
        torch.randn(2, 5, 6).double(),
        torch.randn(2, 5, 4).double(),
        torch.randperm(24)[:7].sort().values.int(),
    )
    x.requires_grad_(True), y.requires_grad_(True)
    values, seen = torch.randn(7).double().requires_grad_(True), []
    assert torch.autograd.gradcheck(lambda x, y, v: add(x, y, v, indices), (x, y, values))
    S = spread(values, indices, (4, 6))
    out = add(x, y, values, indices, seen.append)
    assert torch.allclose(out, y + x @ S.T)
    out.square().sum().backward()
    whole = S.detach().requires_grad_(True)
    (y + x @ whole.T).square().sum().backward()
    assert torch.allclose(seen[0], whole.grad) and torch.allclose(
        values.grad, whole.grad.flatten()[indices.long()]
    )


@torch.no_grad()
def test_sparse_deltas_add_up(tmp_path):
    """Two adapters at once in PEFT: W + S + S', whatever their order."""
    sums = {}
    for seed in range(2):
        torch.manual_seed(seed)
        attached = build("tuner", {"name": "spiel", "density": 0.05}).attach(base())
        with torch.enable_grad():
            train(attached)
        attached.save(tmp_path / str(seed))
        for n, layer in attached.layers.items():
            sums[n] = sums.get(n, 0) + layer.get_delta_weight("default")
    model = PeftModel.from_pretrained(base(), tmp_path / "0", adapter_name="a")
    model.load_adapter(tmp_path / "1", adapter_name="b")
    want = base()
    for n, delta in sums.items():
        want.get_submodule(n).weight += delta
    for order in (["a", "b"], ["b", "a"]):
        model.base_model.set_adapter(order)
        assert torch.allclose(plain(model.eval()), plain(want), atol=1e-5)


def test_a_planted_sparse_part_is_found():
    from luthier.methods.tuners.sparse.dsee import low_rank_and_sparse

    torch.manual_seed(0)
    planted = torch.randperm(64 * 48)[:100]
    W = torch.randn(64, 4) @ torch.randn(4, 48) + torch.zeros(64 * 48).index_fill_(0, planted, 8.0).view(
        64, 48
    )
    U, V, S = low_rank_and_sparse(W, 4, 100)
    found = S.flatten().nonzero().flatten()
    assert torch.isin(found, planted).float().mean() > 0.9 and (W - U @ V - S).norm() < 0.1 * W.norm()


@pytest.mark.long
def test_places_are_drawn_and_found_without_all_of_a_weight():
    torch.manual_seed(0)
    for n, k in ((10, 3), (10, 9), (1000, 400)):
        drawn = some_of(n, k)
        assert len(drawn) == len(set(drawn.tolist())) == k and 0 <= int(drawn.min()) and int(drawn.max()) < n
    counts = torch.zeros(6)
    for _ in range(2000):
        counts[some_of(6, 2)] += 1
    assert (counts / 2000 - 1 / 3).abs().max() < 0.05  # every place as likely
    values = torch.randn(2**20 + 3).abs()
    for k in (1, 1000, 2**17, 2**19):
        assert set(greatest(values, k).tolist()) == set(values.topk(k).indices.tolist())
    values = torch.zeros(2**20)
    values[5:9] = 1.0
    assert set(greatest(values, 4).tolist()) == {5, 6, 7, 8}
