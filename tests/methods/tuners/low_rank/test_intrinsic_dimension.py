"""intrinsic_dimension: fastfood is its dense matrix; moves d numbers; the search for d90 stops where the
metric is reached.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.tuners import put
from luthier.errors import RecipeError
from luthier.registry import build


def test_fastfood_is_its_dense_matrix():
    from scipy.linalg import hadamard as dense

    from luthier.methods.tuners.low_rank.intrinsic_dimension.fastfood import draws, hadamard, project

    d, n = 200, 256
    H = torch.tensor(dense(n), dtype=torch.float32)
    x = torch.randn(n)
    assert torch.allclose(hadamard(x), H @ x, atol=1e-4)
    (G, order, B, norm), a, b = (t[0] for t in draws(d, n, 7, x.device)), torch.randn(d), torch.randn(d)
    P = (H @ torch.diag(G) @ torch.eye(n)[order] @ H @ torch.diag(B.float()) / norm)[:, :d]
    assert torch.allclose(project(a, n, 7), P @ a, atol=1e-4)
    assert torch.allclose(project(a + b, n, 7), project(a, n, 7) + project(b, n, 7), atol=1e-5)
    theta = a.clone().requires_grad_(True)
    g = torch.randn(1000)
    (project(theta, 1000, 3) * g).sum().backward()
    want = torch.stack([project(e, 1000, 3) @ g for e in torch.eye(d)[:5]])
    assert torch.allclose(theta.grad[:5], want, atol=1e-4)
    lengths = torch.stack([project(a, 1000, s).square().sum() for s in range(60)])
    assert abs(float(lengths.mean() / a.square().sum()) - 1) < 0.05


def test_intrinsic_dimension_moves_d_numbers():
    for said in (True, False):
        attached = put("intrinsic_dimension", d=100, said=said)
        assert sum(p.numel() for p in attached.parameters().values()) == 100
    with pytest.raises(RecipeError, match="is not enough for a scale per module"):
        put("intrinsic_dimension", d=14)
    one, other = put("intrinsic_dimension", d=100), put("intrinsic_dimension", d=100, seed=1)
    deltas = []
    for attached in (one, other):
        next(iter(attached.layers.values())).adapter_params["default"].theta.data.normal_(
            generator=torch.Generator().manual_seed(0)
        )
        deltas.append([layer.get_delta_weight("default").detach() for layer in attached.layers.values()])
    assert not torch.allclose(deltas[0][0], deltas[1][0]) and not torch.allclose(deltas[0][0], deltas[0][3])


@pytest.mark.parametrize("cache_gb, passes", [(1.0, 1), (1e-9, 2), (0.0, 2)])
def test_maps_are_drawn_once(monkeypatch, cache_gb, passes):
    """Or for each pass that needs them, where they may take no room; the numbers are the same."""
    from luthier.methods.tuners.low_rank.intrinsic_dimension import fastfood

    count, draws = [], fastfood.draws
    monkeypatch.setattr(fastfood, "draws", lambda *a: count.append(a) or draws(*a))
    attached, plain = put("intrinsic_dimension", d=100, cache_gb=cache_gb), put("intrinsic_dimension", d=100)
    gradients = []
    for one in (attached, plain):
        theta = next(p for n, p in one.parameters().items() if n.endswith("theta"))
        theta.data.fill_(0.1)
        if one is attached:
            count.clear()
        for _ in range(2):
            theta.grad = None
            one.model(torch.arange(6)[None]).logits.square().mean().backward()
            if one is attached:
                # a pass begins with the layer with which the one before it ended
                assert passes * len(attached.layers) - len(count) in (0, 1, 2)
                count.clear()
                passes = 0 if cache_gb == 1.0 else passes
        gradients.append(theta.grad)
    assert torch.equal(*gradients)


def test_the_search_for_d90_stops_where_the_metric_is_reached(tiny):
    from luthier.recipe.recipe import Recipe

    def found(share: float) -> int:
        plan = build(
            "plan",
            {
                "name": "intrinsic_dimension",
                "dimensions": [100, 200, 400, 800],
                "learning_rates": [0.1, 0.3],
                "share": share,
            },
        )
        play = plan.recipes(Recipe.load({"model": tiny}))
        asked, said = next(play), SimpleNamespace(after={"accuracy": 0.8}, folder="full", stats={})
        try:
            while True:
                asked = play.send(said)
                said = [
                    SimpleNamespace(
                        after={"accuracy": r.tuner["d"] / 1000 + r.learning_rate / 100},
                        folder=str(r.tuner["d"]),
                        stats={},
                    )
                    for r in asked
                ]
        except StopIteration as end:
            return int(end.value.folder)

    ds = [found(share) for share in (0.9, 0.4, 0.2, 0.1)]
    assert ds == sorted(ds, reverse=True) and ds == [800, 400, 200, 100]


def test_d90_by_model(tiny):
    """Two models, of which the larger one needs less: each is searched by itself."""
    from luthier.recipe.recipe import Recipe

    settings = {"dimensions": [100, 200, 400], "learning_rates": [0.1], "models": ["small", "large"]}
    play = build("plan", {"name": "intrinsic_dimension", **settings}).recipes(Recipe.load({"model": tiny}))
    needs, request = {"small": 400, "large": 200}, next(play)

    def answer(one):
        accuracy = 1.0 if one.tuner == "full" else min(1.0, one.tuner["d"] / needs[one.model])
        return SimpleNamespace(after={"accuracy": accuracy}, folder=one.model, stats={"moving": 7})

    with pytest.raises(StopIteration) as end:
        while True:
            request = play.send(
                [answer(r) for r in request] if isinstance(request, list) else answer(request)
            )
    table = end.value.value.stats["table"]
    assert [(line["model"], line["d90"]) for line in table] == [("small", 400), ("large", 200)]


def test_nothing_of_the_size_of_the_network_is_kept_for_the_backward_pass():
    attached = put("intrinsic_dimension", d=200)
    weights = sum(m.get_base_layer().weight.nbytes for m in attached.layers.values())
    frozen = {p.untyped_storage().data_ptr() for p in attached.model.parameters()}
    layer = attached.layers["model.layers.0.mlp.up_proj"]
    kept = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in frozen:
            kept.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = torch.randn(3, 32, requires_grad=True)
        y = layer(x)
    assert sum(kept) < layer.get_base_layer().weight.nbytes / 2 < weights
    y.square().sum().backward()
    theta = next(p for n, p in attached.parameters().items() if n.endswith("theta"))
    assert x.grad is not None and bool(theta.grad.any())
