"""tcm: is its entropies by hand; a step guided by it lowers it where a sum does not."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.objectives import batch_of, cast, make_rows
from luthier.methods.objectives.representation.tcm import surrogate
from luthier.registry import build


def test_tcm_is_its_entropies_by_hand():
    even, sure = torch.full((6, 3), -math.log(3.0)), torch.eye(3).repeat(2, 1).clamp(min=1e-9).log()
    assert float(surrogate(even)) == pytest.approx(math.log(3.0), abs=1e-6)
    assert float(surrogate(sure)) == pytest.approx(0.0, abs=1e-5)
    assert float(surrogate(sure[:1].expand(4, 3))) == pytest.approx(math.log(3.0), abs=1e-5)
    roles, batch = cast(), batch_of(make_rows(3, k=1))
    first = batch.place == 0
    logp = roles.policy.outputs(batch).apply(lambda z: z.log_softmax(-1))[first]
    value = build("objective", "tcm").loss(roles, batch)
    assert torch.allclose(value, surrogate(logp)[None]) and value.shape == (1,)


@pytest.mark.long
def test_a_step_guided_by_tcm_lowers_it_where_a_sum_does_not():
    """A linear classifier, two losses of a source that pull apart, and unlabelled rows of a target."""
    estimator, sums, guided = build("estimator", "pareto_da"), [], []
    for seed in range(120):
        torch.manual_seed(seed)
        W = torch.randn(5, 3, requires_grad=True)
        source, target, labels = torch.randn(16, 5), torch.randn(16, 5) + 0.5, torch.randint(3, (2, 16))
        guide = lambda weight, x=target: surrogate((x @ weight).log_softmax(-1))
        losses = [torch.nn.functional.cross_entropy(source @ W, some) for some in labels] + [guide(W)]
        grads = torch.stack([torch.autograd.grad(loss, W)[0].flatten() for loss in losses])
        values = torch.tensor([float(loss.detach()) for loss in losses])
        share = estimator.combine((grads @ grads.T).double(), values, None).float()
        if (grads[:2] @ grads[2]).prod() < 0:  # one loss speaks for the guide, the other against it
            for change, mix in ((sums, torch.tensor([1.0, 1.0, 0.0])), (guided, share)):
                step = W.detach() - 1e-3 * (mix @ grads).view(5, 3)
                change.append(float((guide(step) - guide(W)).detach()))
    rises = [place for place, change in enumerate(sums) if change > 0]
    assert all(change < 0 for change in guided)
    assert len(rises) >= 3
