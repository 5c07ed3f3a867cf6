"""compression: bits, bytes and errors are those of the codes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.models import make_llama
from helpers.subset_tuners import batch
from helpers.tuners import base
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.evaluators.cost.compression import error_of, linear_weights
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy
from luthier.model.quantized import quantize
from luthier.model.quantized_linear import modules
from luthier.registry import build


def test_bits_bytes_and_errors_are_those_of_the_codes(tmp_path):
    plain = make_llama(num_hidden_layers=1)
    plain.save_pretrained(tmp_path)
    model = type(plain).from_pretrained(tmp_path)
    rtn = build("quantizer", {"name": "rtn", "bits_per_weight": 3, "group_size": 16})
    quantize(model, rtn)
    roles = SimpleNamespace(policy=Policy(Causal(), model, Untuned(model)), batch=batch)
    rows = [{"id": i, "prompt": "", "ids": list(range(3 + i, 10 + i)), "completions": [""]} for i in range(2)]
    with torch.no_grad():
        found = build("evaluator", "compression").run(roles, rows, tmp_path, "after")
    names = linear_weights(model)
    assert set(names) == set(modules(model)) and len(names) == 7
    count = sum(m.size[0] * m.size[1] for m in names.values())
    assert found["bits_per_weight"] == pytest.approx(
        sum(rtn.bits(m.size) * m.size[0] * m.size[1] for m in names.values()) / count, rel=1e-3
    )
    rest = sum(p.nbytes for p in model.parameters())
    assert found["weights_mb"] * 2**20 == pytest.approx(rest + sum(m.stored for m in names.values()))
    off = sum(float((m.dense() - plain.get_submodule(n).weight).square().sum()) for n, m in names.items())
    total = sum(float(plain.get_submodule(n).weight.square().sum()) for n in names)
    assert found["weight_error"] == pytest.approx((off / total) ** 0.5, rel=1e-4)
    assert found["perplexity"] > 1 and found["tokens_per_second"] > 0


def test_square_weights_of_conv1d_are_compared_as_they_lie(tmp_path):
    plain = base("gpt2")
    plain.save_pretrained(tmp_path)
    model = type(plain).from_pretrained(tmp_path)
    assert error_of(model) == 0
    with torch.no_grad():
        for module in linear_weights(model).values():
            module.weight.mul_(1.5)
    assert error_of(model) == pytest.approx(0.5)
