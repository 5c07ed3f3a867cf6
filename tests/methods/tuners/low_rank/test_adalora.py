"""adalora: shares ranks out as peft does; goes on bit for bit; orthogonality is the gradient of its term and
nothing where it holds.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.weight_tuners import One
from luthier.clock import Clock
from luthier.registry import build


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def test_adalora_shares_ranks_out_as_peft_does():
    """The same numbers, gradients and updates in both: the same importance, the same triplets lost, step by
    step.
    """
    from peft import AdaLoraConfig, get_peft_model

    total, begin, end = 12, 2, 4
    settings = AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=begin,
        tfinal=end,
        deltaT=1,
        total_step=total,
        lora_alpha=8,
        target_modules=["one", "two"],
    )
    theirs = get_peft_model(Two(), settings)
    model = Two()
    spec = {
        "name": "adalora",
        "init_r": 4,
        "target_r": 2,
        "tinit": begin / total,
        "tfinal": end / total,
        "lora_alpha": 8,
    }
    ours = build("tuner", {**spec, "target_modules": ["one", "two"]}).attach(model)
    for name, layer in ours.layers.items():
        p, q = layer.tensors("default"), theirs.base_model.model.get_submodule(name)
        for slot, value in (
            ("A", q.lora_A["default"]),
            ("E", q.lora_E["default"]),
            ("B", q.lora_B["default"]),
        ):
            value.data.normal_(0, 0.3)
            getattr(p, slot).data.copy_(value.data.view_as(getattr(p, slot)))
    clock, x = Clock(0, total=total), torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    target = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))
    left = []
    for step in range(total):
        clock.step = step
        for network, mine in ((model, True), (theirs, False)):
            moving = [p for p in network.parameters() if p.requires_grad]
            for p in moving:
                p.grad = None
            (network(x) - target).square().mean().backward()
            with torch.no_grad():
                for p in moving:
                    p -= 0.02 * p.grad
            ours.after_step(clock) if mine else theirs.base_model.update_and_allocate(step + 1)
        for name, layer in ours.layers.items():
            q = theirs.base_model.model.get_submodule(name)
            assert torch.allclose(layer.tensors("default").E, q.lora_E["default"].view(-1), atol=1e-4), (
                step,
                name,
            )
        left.append(sum(int((layer.tensors("default").E != 0).sum()) for layer in ours.layers.values()))
    assert left[0] == 8 and left[-1] == 4 and len(set(left)) > 2


@pytest.mark.long
def test_adalora_goes_on_bit_for_bit(tmp_path):
    import luthier
    from helpers.rows import SUMS

    keys = {
        "model": "toy:lm-small",
        "data": SUMS,
        "tuner": {"name": "adalora", "init_r": 4, "target_r": 2},
        "learning_rate": 1e-2,
        "max_steps": 8,
        "transforms": [{"name": "orthogonality", "weight": 0.1}, "clip"],
        "evaluate": [],
        "save_steps": 4,
        "per_device_train_batch_size": 8,
    }
    whole = luthier.tune(keys, folder=tmp_path / "whole")
    from luthier.run.run import perform

    perform(luthier.Recipe.load(keys), tmp_path / "parts", stop_at=4)
    parts = luthier.tune(keys, folder=tmp_path / "parts")
    a, b = (luthier.load(r.folder).roles.tuner.tensors() for r in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    ranks = [int((v != 0).sum()) for k, v in a.items() if k.endswith(".E")]
    assert sum(ranks) == 2 * len(ranks)


def test_orthogonality_is_the_gradient_of_its_term_and_nothing_where_it_holds():
    model = One(torch.randn(8, 6))
    attached = build(
        "tuner", {"name": "adalora", "init_r": 3, "target_r": 2, "target_modules": ["fc"]}
    ).attach(model)
    (group,) = attached.all_param_groups()
    A, B = group.params["A"], group.params["B"]
    A.data.normal_(), B.data.normal_()
    term = (A @ A.T - torch.eye(3)).square().sum() + (B.T @ B - torch.eye(3)).square().sum()
    want = torch.autograd.grad(0.3 * term, [A, B])
    zero = {slot: torch.zeros_like(p) for slot, p in group.params.items()}
    got = build("transform", {"name": "orthogonality", "weight": 0.3}).apply(zero, {}, group, 1)
    assert (
        torch.allclose(got["A"], want[0], rtol=1e-4)
        and torch.allclose(got["B"], want[1], rtol=1e-4)
        and not got["E"].any()
    )
    A.data, B.data = (
        torch.linalg.qr(torch.randn(6, 3))[0].T.contiguous(),
        torch.linalg.qr(torch.randn(8, 3))[0],
    )
    still = build("transform", "orthogonality").apply(zero, {}, group, 1)
    assert max(float(g.abs().max()) for g in still.values()) < 1e-5
