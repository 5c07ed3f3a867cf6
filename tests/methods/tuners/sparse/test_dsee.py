"""dsee: dsee; takes heads and units out; a head without a coefficient is none; pulls coefficients and is
written small.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn

from helpers.tuners import base, logprobs, plain, put
from helpers.weight_tuners import descend, numbers, to_end
from luthier.errors import RecipeError
from luthier.methods.tuners._base import Untuned
from luthier.methods.tuners.sparse._sparse import spread
from luthier.registry import build


def test_dsee():
    torch.manual_seed(0)
    plain_, W = build("tuner", {"name": "dsee", "r": 4, "n_sparse": 0}), torch.randn(12, 10)
    p = numbers(plain_.init(W))
    p.B = torch.randn(12, 4)
    # LoRA, where there is no mask and no S
    assert torch.allclose(plain_.weight(W, p), W + 8 * p.B @ p.A, atol=1e-5)
    attached = put("dsee", r=4, n_sparse=5, sparsity=0.5, prune_at=0.5, target_modules=["q_proj", "up_proj"])
    start = {n: layer.tensors("default").indices.clone() for n, layer in attached.layers.items()}
    to_end(descend(attached, lambda: logprobs(attached).mean().neg(), 6, 0.01))
    for n, layer in attached.layers.items():
        p, W = layer.tensors("default"), layer.get_base_layer().weight
        assert (
            torch.equal(p.indices, start[n])
            and len(p.values) == 5
            and int((~p.mask).sum()) == round(0.5 * W.numel())
        )
        x = torch.randn(3, W.shape[1])
        want = x @ (W * p.mask + 8 * p.B @ p.A + spread(p.values, p.indices, W.shape)).T
        assert torch.allclose(layer(x), want, atol=1e-5)


def structured(make=base, **more):
    how = dict(r=4, n_sparse=5, head_sparsity=0.5, ffn_sparsity=0.4, prune_at=0.5)
    attached = build("tuner", {"name": "dsee", **how, **more}).attach(make())
    own = {
        n: layer.tensors("default").c
        for n, layer in attached.layers.items()
        if hasattr(layer.tensors("default"), "c")
    }
    return attached, own


def test_dsee_takes_heads_and_units_out():
    """From start to end, then without what has left: the same answers for the multiplications that the shape
    says.
    """
    from luthier.methods.tuners.pruned._elastic import macs

    attached, own = structured()
    assert {n.rpartition(".")[2]: len(c) for n, c in own.items()} == {"o_proj": 2, "down_proj": 64}
    start = logprobs(Untuned(base())).detach()
    assert torch.equal(logprobs(attached), start)
    moved = [attached.tensors() for _ in descend(attached, lambda: logprobs(attached).mean().neg(), 6, 0.01)]
    for n, c in own.items():
        before, after, last = (m[f"{n}.c"] for m in (moved[2], moved[3], moved[5]))
        gone = 1 if n.endswith("o_proj") else 26
        assert not torch.equal(before, torch.ones(len(c))) and (before != 0).all()
        assert (after == 0).sum() == gone and before[after == 0].abs().max() <= before[after != 0].abs().min()
        # the rest of the run leaves them
        assert torch.equal(after, last) and torch.equal(after[after != 0], before[after != 0])
        assert not torch.equal(moved[3][f"{n}.A"], moved[5][f"{n}.A"])
    small, ids, counted = attached.sliced(), torch.arange(3, 17).reshape(2, 7), []
    assert (plain(small) - plain(attached.model)).abs().max() < 1e-5
    shape = ((1, 38),) * 2
    for m in small.modules():
        if isinstance(m, nn.Linear):
            m.register_forward_hook(lambda m, x, y: counted.append(y.numel() * x[0].shape[-1]))
    small(ids)
    anatomy, whole = attached.anatomy, base()
    assert sum(counted) == ids.numel() * macs(whole, anatomy, shape)
    # half of q, k, v (k and v are half as wide) and o; 26 of 64 units
    per_layer = 0.5 * (4 * 32 * 32 - 2 * 32 * 16) + 26 * 3 * 32
    assert macs(whole, anatomy, anatomy.whole) - macs(whole, anatomy, shape) == 2 * per_layer


@torch.no_grad()
def test_a_head_without_a_coefficient_is_none():
    from helpers.elastic import bert, logits

    for make, says in ((base, plain), (bert, logits)):
        attached, own = structured(make)
        torch.manual_seed(2)
        for k, p in attached.parameters().items():
            if k.rpartition(".")[2] in ("B", "values"):
                p.normal_(std=0.1)
        o, c = next((n, c) for n, c in own.items() if n.endswith(("o_proj", "attention.output.dense")))
        c[0], size = 0.0, attached.layers[o].get_base_layer().weight.shape[1] // len(c)
        want, whole = says(attached.model), says(make())
        W = attached.layers[o].get_base_layer().weight
        # what reads the head does not matter, nor does what it says
        W[:, :size] = torch.randn(W[:, :size].shape)
        assert (says(attached.model) - want).abs().max() < 1e-5 and (want - whole).abs().max() > 1e-2
        with attached.merged():
            assert (says(attached.model) - want).abs().max() < 1e-5


def test_dsee_pulls_coefficients_and_is_written_small(tmp_path):
    ends = []
    for weight in (0.0, 0.5):
        attached, own = structured(l1_weight=weight, prune_at=1.0)
        # one plain gradient step
        to_end(descend(attached, lambda tuned=attached: logprobs(tuned).mean().neg(), 1, 0.1, "momentum"))
        ends.append([c.detach().clone() for c in own.values()])
    assert all(torch.allclose(a - b, torch.full_like(a, 0.05), atol=1e-6) for a, b in zip(*ends, strict=True))
    attached, _ = structured()
    to_end(descend(attached, lambda: logprobs(attached).mean().neg(), 4, 0.01))
    attached.save(tmp_path / "adapter")
    assert torch.allclose(
        plain(PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()),
        plain(attached.model),
        atol=1e-5,
    )
    attached.export_merged(tmp_path / "small")
    again = type(attached.model).from_pretrained(tmp_path / "small").eval()
    assert (plain(again) - plain(attached.model)).abs().max() < 1e-5
    assert again.config.intermediate_size == 38 and again.config.num_key_value_heads == 1
    with pytest.raises(RecipeError, match=r"target_modules must include model.layers.0.self_attn.o_proj"):
        structured(target_modules=["q_proj", "down_proj"])
    with pytest.raises(RecipeError, match="no separate q, k, v"):
        structured(lambda: base("gpt2"))
