"""sam: is the gradient at the worst nearby point; a step aside that rounding swallows is refused."""

from __future__ import annotations

import pytest
import torch

from helpers.optimizers import Rig, Seen
from luthier.errors import Refused


def test_sam_is_the_gradient_at_the_worst_nearby_point():
    rig, plain = Rig(estimator={"name": "sam", "rho": 0.3}, transforms=(seen := Seen(),)), Rig()
    plain.closure()
    own = plain.tuner.parameters()
    norm = sum(p.grad.square().sum() for p in own.values()).sqrt()
    with plain.tuner.using({k: p.detach() + 0.3 * p.grad / norm for k, p in own.items()}):
        plain.closure()
    rig.go(1)
    assert rig.calls == 2 and all(torch.allclose(seen.grads[k], own[k].grad, atol=1e-6) for k in own)


@pytest.mark.parametrize(
    "estimator", [{"name": "sam", "rho": 1e-6}, {"name": "mezo", "eps": 1e-6}], ids=["sam", "mezo"]
)
def test_a_step_aside_that_rounding_swallows_is_refused(estimator):
    rig = Rig(estimator=estimator, dtype=torch.bfloat16)
    before = rig.tuner.tensors()
    with pytest.raises(Refused, match="bfloat16 rounds off .*% of this estimator's perturbation"):
        rig.go(1)
    assert all(torch.equal(p, before[k]) for k, p in rig.tuner.parameters().items())
    Rig(estimator=estimator).go(1)
