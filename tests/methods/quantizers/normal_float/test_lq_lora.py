"""lq_lora: lq error falls until it stops and beats plain quantization; lq of a matrix of that rank is exact;
lq weights; bits are allocated as the best of all allocations.
"""

from __future__ import annotations

import pytest
import torch

from helpers.quantizers import lq, normal
from helpers.tuners import base, logprobs, put, train
from luthier.errors import RecipeError
from luthier.model.quantized import quantize
from luthier.model.quantized_linear import modules, numbers
from luthier.registry import build


def test_lq_error_falls_until_it_stops_and_beats_plain_quantization():
    from luthier.methods.quantizers.normal_float.lq_lora import WeightedError

    W, q = normal(64, 96, seed=1), lq()
    codes, said = q.turns(W, q.forms()[0], WeightedError(None))
    assert len(said) > 1 and all(a > b for a, b in zip(said, said[1:]))
    assert float((q.dequantize(codes, (64, 96), torch.float32) - W).square().sum()) == pytest.approx(
        said[-1], rel=1e-3
    )
    form = q.forms()[0]
    plain = form.dequantize(form.quantize(W), (64, 96), torch.float32)
    assert said[-1] < 0.8 * float((plain - W).square().sum())


def test_lq_of_a_matrix_of_that_rank_is_exact():
    W, q = normal(64, 8, seed=1) @ normal(8, 96, seed=2), lq()
    assert torch.allclose(q.dequantize(q.quantize(W), (64, 96), torch.float32), W, atol=1e-3)


def test_lq_weights():
    """Even weights change nothing; uneven ones lower the error where they are large."""
    W, q = normal(64, 96, seed=1), lq()
    even = q.quantize(W, (torch.full((64,), 2.0), torch.full((96,), 3.0)))
    assert all(torch.allclose(v.float(), even[k].float(), atol=1e-4) for k, v in q.quantize(W).items())
    heavy = torch.ones(64)
    heavy[:8] = 100.0
    uneven = q.quantize(W, (heavy, torch.ones(96)))
    off = lambda codes: (q.dequantize(codes, (64, 96), torch.float32) - W)[:8].norm()
    assert off(uneven) < 0.9 * off(even)


def test_bits_are_allocated_as_the_best_of_all_allocations():
    import itertools

    pytest.importorskip("scipy")
    from luthier.methods.quantizers.normal_float.lq_lora import allocate

    errors = (
        torch.rand(4, 3, generator=torch.Generator().manual_seed(3)).sort(1, descending=True).values.tolist()
    )
    sizes = [[200.0 * (i + 1), 300.0 * (i + 1), 410.0 * (i + 1)] for i in range(4)]
    for budget in (2000, 2600, 3300, 4200):
        found = allocate(errors, sizes, budget)
        every = [
            c for c in itertools.product(range(3), repeat=4) if sum(s[k] for s, k in zip(sizes, c)) <= budget
        ]
        best = min(every, key=lambda c: sum(e[k] for e, k in zip(errors, c)))
        assert sum(e[k] for e, k in zip(errors, found)) == pytest.approx(
            sum(e[k] for e, k in zip(errors, best))
        )
    with pytest.raises(RecipeError, match="target_bits"):
        allocate(errors, sizes, 1999)


@pytest.mark.long
def test_lq_keeps_its_budget_over_a_network_and_trains_its_low_rank_part():
    pytest.importorskip("scipy")
    model = base("llama")
    q = build("quantizer", {"name": "lq_lora", "rank": 4, "target_bits": 3.2})
    quantize(model, q)
    some = modules(model)
    bits = sum(m.quantizer.forms()[0].bits(m.size) * m.size[0] * m.size[1] for m in some.values())
    count = numbers(model)
    assert bits <= 3.2 * count and len({m.quantizer.forms()[0] for m in some.values()}) > 1
    untuned = logprobs(put("ssf", copied(model)))
    attached = put("lora", model, init_lora_weights="lq", r=4)
    assert torch.allclose(logprobs(attached), untuned, atol=1e-4)
    layer = attached.layers["model.layers.0.self_attn.q_proj"]
    held = layer.base_layer.codes
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.allclose(B @ A * layer.scaling["default"], held["L1"] @ held["L2"], atol=1e-5)
    train(attached)
    with attached.off():
        assert torch.allclose(logprobs(attached), untuned, atol=1e-5)
    with pytest.raises(RecipeError, match="r: 4"):
        put("lora", lq_model(), init_lora_weights="lq", r=8)
    with pytest.raises(RecipeError, match="needs a base quantized with"):
        put("lora", base("llama"), init_lora_weights="lq", r=4)


def copied(model):
    import copy

    return copy.deepcopy(model)


def lq_model():
    model = base("llama")
    quantize(model, lq(rank=4))
    return model
