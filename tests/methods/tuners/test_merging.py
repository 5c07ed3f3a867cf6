"""Merging into the weights: what it adds up, and what it does not take for a refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.tuners import base, plain, put
from luthier.methods.tuners._peft import config_for


def test_memory_that_ran_out_is_not_a_tuner_that_cannot_merge(monkeypatch):
    attached = put("lora")

    def full() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(attached.peft, "merge_adapter", full)
    with pytest.raises(torch.cuda.OutOfMemoryError), attached.merged():
        pass


@torch.no_grad()
def test_a_merged_bias_outlives_the_merging_of_an_adapter_without_one():
    """The modules have no bias of their own: what they have is the first adapter's."""
    attached = put("ssf", target_modules=["q_proj"])
    scales = replace(attached.settings, scale_only=list(attached.layers))
    attached.peft.add_adapter("second", config_for(scales, base()))
    attached.peft.base_model.set_adapter(["default", "second"])
    for layer in attached.layers.values():
        for params in layer.adapter_params.values():
            for p in params.parameters():
                p.add_(torch.randn(p.shape) * 0.2)
    tuned = plain(attached.model)
    attached.peft.merge_adapter(["default", "second"])
    assert torch.allclose(plain(attached.model), tuned, atol=2e-5)
    attached.peft.unmerge_adapter()
    assert torch.allclose(plain(attached.model), tuned, atol=1e-6)
    assert all(layer.get_base_layer().bias is None for layer in attached.layers.values())
