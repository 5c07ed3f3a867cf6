"""nf4: what bitsandbytes wrote is what it reads."""

from __future__ import annotations

import json

import pytest

import luthier
from helpers.rows import recipe_of
from luthier.serve.export import export_form


def test_a_checkpoint_is_bitsandbytes_own(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    run = luthier.tune(recipe_of(tiny) | {"tuner": "lora"}, folder=tmp_path / "run").folder
    done = export_form(run, "nf4", tmp_path / "out")
    assert 0.01 < done.agreement.weights < 0.2
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes" and config["bnb_4bit_quant_type"] == "nf4"
