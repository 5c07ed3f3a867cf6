"""mgpo: takes one gradient where the momentum leads; embeddings are left where they are; noise and
displacement lead to flatter places.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.tuners import logprobs
from helpers.weight_tuners import One, Q, walk
from luthier.clock import Clock
from luthier.registry import build
from luthier.train.optimizer import Chain


@pytest.mark.long
def test_mgpo_takes_one_gradient_where_the_momentum_leads():
    one, _, _ = walk({"name": "mgpo", "rho": 0.0})
    two, _, _ = walk("backprop")
    assert all(torch.equal(v, two.tensors()[k]) for k, v in one.tensors().items())
    attached, chain, _ = walk({"name": "mgpo", "rho": 0.3, "mu": 0.9, "beta": 0.8})
    for name in attached.layers:  # the direction is that of Adam's mean
        for slot in "AB":
            assert torch.allclose(
                chain.state[name]["mgpo"][slot], chain.state[name]["0"][slot]["m"], atol=1e-8
            )
    kept = {n: chain.state[n]["mgpo"] for n in attached.layers}
    sizes, slots = (
        {n: k["size"].clone() for n, k in kept.items()},
        {s.name: s.params for s in chain.param_groups()},
    )
    start, E = {}, {}
    for n, layer in attached.layers.items():
        M = 4.0 * (kept[n]["B"] @ slots[n]["A"] + slots[n]["B"] @ kept[n]["A"]).detach()
        E[n] = 0.3 * M / M.norm() / sizes[n].clamp(min=0.1)
        start[n] = layer.get_base_layer().weight.data
        layer.get_base_layer().weight.data = start[n] + E[n]
    loss = logprobs(attached).mean().neg()
    want = torch.autograd.grad(loss, list(attached.parameters().values()))
    for n, layer in attached.layers.items():
        layer.get_base_layer().weight.data = start[n]
    calls, seen, was = [], [], attached.tensors()

    def closure() -> float:
        for p in attached.parameters().values():
            p.grad = None
        said = logprobs(attached).mean().neg()
        said.backward()
        calls.append(said.item()), seen.extend(p.grad.clone() for p in attached.parameters().values())
        return calls[-1]

    assert (
        build("estimator", {"name": "mgpo", "rho": 0.3, "beta": 0.8}).step(closure, chain, chain.clock)
        == calls[0]
    )
    assert len(calls) == 1 and abs(calls[0] - loss.item()) < 1e-5
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(seen, want, strict=True))
    gA, gB = (dict(zip(attached.parameters(), seen, strict=True))[f"{Q}.{slot}"] for slot in "AB")
    size = (4.0 * (was[f"{Q}.B"] @ gA + gB @ was[f"{Q}.A"])).norm()
    assert torch.allclose(chain.state[Q]["mgpo"]["size"], 0.8 * sizes[Q] + 0.2 * size, rtol=1e-4)


@pytest.mark.parametrize("name", ["ggpo", "mgpo"])
def test_embeddings_are_left_where_they_are(name):
    attached, chain, _ = walk(name, 2, target_modules=["q_proj", "embed_tokens"])
    assert name in chain.state[Q] and name not in chain.state["model.embed_tokens"]
    assert attached.parameters()["model.embed_tokens.B"].any()


def flatness(estimator, seed: int) -> float:
    """How much the loss of a small network rises on average where its weights are changed at random, after
    100 steps of LoRA.
    """

    class Net(One):
        def __init__(self):
            super().__init__(torch.randn(32, 12) / 12**0.5)
            self.out = nn.Linear(32, 8)

        def forward(self, x):
            return self.out(torch.tanh(self.fc(x)))

    torch.manual_seed(seed)
    x, y, net = torch.randn(16, 12), torch.randn(16, 8), Net()
    attached = build("tuner", {"name": "lora", "r": 8, "target_modules": ["fc", "out"]}).attach(net)
    clock = Clock(seed=3, total=100)
    chain = Chain([build("transform", "adam")], attached, clock, 0.01)
    method = build("estimator", estimator)
    for clock.step in range(100):

        def closure() -> float:
            for p in attached.parameters().values():
                p.grad = None
            torch.manual_seed(clock.derive_seed("noise"))
            loss = (attached.model(x) - y).square().mean()
            loss.backward()
            return loss.item()

        method.step(closure, chain, clock)
    weights = [layer.get_base_layer().weight for layer in attached.layers.values()]
    kept, rises = [w.clone() for w in weights], []
    with torch.no_grad():
        here = (attached.model(x) - y).square().mean()
        for _ in range(50):
            for w, k in zip(weights, kept, strict=True):
                w.copy_(k + 0.1 * torch.randn_like(k) / k.shape[1] ** 0.5)
            rises.append(float((attached.model(x) - y).square().mean() - here))
    return sum(rises) / 50


@pytest.mark.slow
@pytest.mark.long
def test_noise_and_displacement_lead_to_flatter_places():
    lora = [flatness("backprop", seed) for seed in range(3)]
    for name in ("ggpo", "mgpo"):
        shares = [flatness(name, seed) / lora[seed] for seed in range(3)]
        assert max(shares) < 1 and sum(shares) / 3 < 0.95, (name, shares)
