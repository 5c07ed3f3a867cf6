"""rtn: codes of any width lie side by side; round to nearest by its formula; eight bits are enough and two
are not.
"""

from __future__ import annotations

import pytest
import torch

from helpers.quantizers import normal, on_codes
from helpers.tuners import logprobs, put
from luthier.registry import build


def test_codes_of_any_width_lie_side_by_side():
    from luthier.methods.quantizers.normal_float._bits import pack, unpack

    for bits in range(1, 9):
        codes = torch.randint(
            0, 2**bits, (4093,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8
        )
        packed = pack(codes, bits)
        assert len(packed) == (4096 // 8 * bits if bits < 8 else 4093) and torch.equal(
            unpack(packed, bits, 4093), codes
        )


def test_round_to_nearest_by_its_formula():
    W = normal(4, 128)
    for bits in (2, 3, 4, 8):
        q = build("quantizer", {"name": "rtn", "bits_per_weight": bits})
        assert q.bits(W.shape) == bits + 32 / 64
        step = (W.view(-1, 64).amax(1) - W.view(-1, 64).amin(1)) / (2**bits - 1)
        error = (q.dequantize(q.quantize(W), tuple(W.shape), torch.float32) - W).view(-1, 64).abs().amax(1)
        assert (error <= step * 0.51 + 2e-3).all()


def perplexity(model) -> float:
    return float((-logprobs(put("lora", model))).mean().exp())


@pytest.mark.long
@torch.no_grad()
def test_eight_bits_are_enough_and_two_are_not():
    from helpers.tuners import base as fresh

    plain = fresh("llama")
    want = perplexity(plain)
    eight, two = (perplexity(on_codes("llama", {"name": "rtn", "bits_per_weight": b})[0]) for b in (8, 2))
    assert abs(eight - want) < 0.01 * want and abs(two - want) > 5 * abs(eight - want)


def test_tiny_and_huge_weights_are_as_exact_as_others():
    """Scales in 16 bits: of weights of size 1e-6 they would be rounded to nothing, of 1e7 be infinite."""
    W = normal(8, 128)
    for name in ("rtn", "gptq"):
        for bits in (4, 8):
            q = build("quantizer", {"name": name, "bits_per_weight": bits, "group_size": 64})
            errors = []
            for size in (1.0, 1e-2, 1e-4, 1e-6, 1e-9, 1e7):
                stats = torch.eye(128) if name == "gptq" else None
                back = q.dequantize(q.quantize(size * W, stats), tuple(W.shape), torch.float32)
                errors.append(float((back - size * W).norm() / (size * W).norm()))
            assert max(errors) < 1.1 * errors[0]
    usual = build("quantizer", "rtn").quantize(normal(8, 128))
    assert "unit" not in usual
