"""glad: without its share is backprop and with all of it sam; on a quadratic is its closed form."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import luthier
from luthier.clock import Clock
from luthier.registry import build


@pytest.mark.long
def test_glad_without_its_share_is_backprop_and_with_all_of_it_sam(base, tmp_path):
    def end(name: str, estimator) -> list[float]:
        return luthier.tune({**base, "estimator": estimator}, folder=tmp_path / name).losses

    assert end("a", {"name": "glad", "alpha": 0.0}) == end("b", "backprop")
    assert end("c", {"name": "glad", "alpha": 1.0, "rho": 0.1}) == pytest.approx(
        end("d", {"name": "sam", "rho": 0.1}), rel=1e-5
    )


def test_glad_on_a_quadratic_is_its_closed_form():
    from luthier.methods.tuners._base import ParamGroup, TunedModel
    from luthier.train.optimizer import Chain

    torch.manual_seed(0)
    A = torch.randn(6, 6)
    H, p = A @ A.T / 6, torch.nn.Parameter(torch.randn(6))

    class One(TunedModel):
        def all_param_groups(self):
            return [ParamGroup("p", {"weight": p})]

    seen = {}

    class Keep:
        def bind(self, attached):
            return self

        def begin(self, rate, last):
            pass

        def gather(self, every):
            return every

        def apply(self, grads, state, group, step):
            seen.update(grads)
            return grads

    clock = Clock(seed=0, total=1)
    chain = Chain([Keep()], One(SimpleNamespace(name="x"), torch.nn.Identity()), clock, 0.0)

    def closure(grad=True):
        p.grad = None
        loss = 0.5 * p @ H @ p
        loss.backward()
        return float(loss.detach())

    g = (H @ p).detach()
    build("estimator", {"name": "glad", "alpha": 0.4, "rho": 1e-2}).step(closure, chain, clock)
    assert torch.allclose(seen["weight"], g + 0.4 * 1e-2 * H @ g / g.norm(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_it_ends_where_the_loss_is_flatter_than_that_of_lora():
    """LoRA on a few rows: how much the loss rises at the worst point nearby is lower with glad."""
    from helpers.tuners import logprobs, put
    from luthier.train.optimizer import Chain

    def loss_of(attached) -> torch.Tensor:
        return -logprobs(attached).mean()

    def sharpness(estimator, rho: float = 0.3) -> float:
        attached = put("lora")
        clock = Clock(seed=3, total=40)
        chain = Chain([build("transform", "adam")], attached, clock, 0.02)

        def closure(grad: bool = True) -> float:
            for p in attached.parameters().values():
                p.grad = None
            loss = loss_of(attached)
            loss.backward()
            return float(loss.detach())

        for clock.step in range(40):
            build("estimator", estimator).step(closure, chain, clock)
        here = closure()
        own = attached.parameters()
        norm = sum(p.grad.square().sum() for p in own.values()).sqrt()
        with torch.no_grad(), attached.using({k: p + rho * p.grad / norm for k, p in own.items()}):
            return float(loss_of(attached)) - here

    assert sharpness({"name": "glad", "rho": 0.3}) < 0.8 * sharpness("backprop")
