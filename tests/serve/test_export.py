"""export: merged is a plain model; a fresh process loads the export without luthier."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    MixtralForCausalLM,
)

from helpers.tuners import LOAD, base, plain, put, run_fresh, train
from luthier.errors import RecipeError
from luthier.kernels.tolerance import logprob_tolerance, magnitude


@torch.no_grad()
def test_export_merged_is_a_plain_model(tmp_path):
    for name, kind in (("lora", "llama"), ("ssf", "gpt2"), ("lora", "gpt2")):
        attached = put(name, base(kind))
        with torch.enable_grad():
            train(attached)
        attached.export_merged(tmp_path / f"{name}-{kind}")
        again = type(attached.model).from_pretrained(tmp_path / f"{name}-{kind}").eval()
        assert torch.allclose(plain(again), plain(attached.model), atol=2e-5)
    with pytest.raises(RecipeError, match="has no parameter for"):  # a bias that Mixtral cannot have
        put("ssf", base("mixtral"), target_modules=["q_proj"]).export_merged(tmp_path / "refused")
    where = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    attached = put("lora", base("mixtral"), **where, modules_to_save=["lm_head"])
    with torch.enable_grad():
        train(attached)
    attached.export_merged(tmp_path / "moe")
    assert torch.allclose(
        plain(MixtralForCausalLM.from_pretrained(tmp_path / "moe").eval()), plain(attached.model), atol=2e-5
    )


@pytest.mark.long
def test_a_fresh_process_loads_the_export_without_luthier(tmp_path):
    base().save_pretrained(tmp_path / "base")
    attached = train(put("lora_sb"))
    attached.export_lora(tmp_path / "adapter")
    load = LOAD.format(
        base=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"), out=str(tmp_path / "out")
    )
    run_fresh(load + "import sys; assert not any(m.startswith('luthier') for m in sys.modules)")
    assert torch.allclose(torch.load(tmp_path / "out"), plain(attached.model), atol=1e-5)


def test_what_rounding_may_change_grows_with_the_log_probabilities():
    assert magnitude(None) == magnitude(-torch.full((4,), 9.0)) == 1.0
    assert magnitude(-torch.full((4,), 25.0)) == 2.5
    model = torch.nn.Linear(2, 2).bfloat16()
    assert logprob_tolerance(model, -torch.full((4,), 20.0)) == 2 * logprob_tolerance(model)
