"""Checkpoints of codes: what compressed-tensors expands is what the exporter meant, and what is no code is as
it was.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

import luthier
from helpers.rows import recipe_of
from luthier.errors import RecipeError
from luthier.methods.exporters.quantized._compressed import common_group
from luthier.registry import build
from luthier.serve.export import export_form


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("compressed")
    return luthier.tune(recipe_of(tiny) | {"tuner": "lora"}, folder=folder / "run").folder


@pytest.mark.parametrize(
    "form, bytes_of_weight",
    [
        ("int8", 1),
        ("fp8", 1),
        ({"name": "gptq", "groups": 16, "init_rows": 4}, 0.5),
        ({"name": "awq", "groups": 16, "init_rows": 4}, 0.5),
    ],
    ids=["int8", "fp8", "gptq", "awq"],
)
def test_codes_are_read_back(run, form, bytes_of_weight, tmp_path):
    pytest.importorskip("compressed_tensors")
    done = export_form(run, form, tmp_path / "out", "float16")
    assert 0 < done.agreement.weights < build("exporter", form).rounding
    assert done.agreement.mean < 0.5
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        name = "model.layers.0.mlp.up_proj."
        keys = {key.removeprefix(name) for key in file.keys() if key.startswith(name)}  # noqa: SIM118
        codes = file.get_tensor(name + ("weight" if "weight" in keys else "weight_packed"))
        assert codes.numel() * codes.element_size() == 96 * 48 * bytes_of_weight
        assert file.get_tensor("model.norm.weight").dtype == torch.float16
        assert "lm_head.weight" in file.keys()  # noqa: SIM118


def test_a_form_that_needs_a_package_says_so(run, tmp_path, monkeypatch):
    from luthier.methods.exporters import _base

    monkeypatch.setattr(_base, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install compressed-tensors"):
        export_form(run, "fp8", tmp_path / "out")


def test_groups_divide_every_row(tiny):
    plain = luthier.load(tiny)
    with pytest.raises(RecipeError, match="set group_size|int8"):
        common_group(plain, ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"])
    assert common_group(plain, ["model.layers.0.mlp.down_proj"]) == 32


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq"])
def test_symmetric_groups_hold_zero_and_lose_little(name):
    W = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    quantizer = build("quantizer", {"name": name, "group_size": 16, "symmetric": True})
    codes = quantizer.quantize(W)
    scale, low = codes["scale"].float(), codes["low"].float()
    assert torch.equal(low, -8 * scale)
    again = quantizer.dequantize(codes, (6, 32), torch.float32)
    assert torch.dist(again, W) < 0.15 * W.norm()
