"""peft: plain peft and transformers load it; refusals. Every type: tests/contracts/test_peft_types.py."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from helpers.tuners import IDS, anywhere, base, each, plain, train
from luthier.errors import RecipeError
from luthier.registry import build


@pytest.mark.long
@each
@torch.no_grad()
def test_plain_peft_and_transformers_load_it(name, tmp_path):
    attached, kind = anywhere(name)
    with torch.enable_grad():
        train(attached)
    attached.save(tmp_path)
    if not (tmp_path / "adapter_config.json").is_file():
        if not (tmp_path / "model.safetensors").is_file():  # a form of its own, and a sentence that says so
            assert attached.why_not_elsewhere()
            return
        assert torch.equal(
            plain(type(attached.model).from_pretrained(tmp_path).eval()), plain(attached.model)
        )
        return
    if attached.virtual:
        embed = attached.model.get_input_embeddings()(IDS)
        want = attached.model(
            inputs_embeds=torch.cat([attached.soft().expand(len(IDS), -1, -1), embed], 1)
        ).logits
        assert torch.allclose(plain(PeftModel.from_pretrained(base(kind), tmp_path).eval()), want, atol=1e-5)
        return
    want = plain(attached.model)
    assert torch.allclose(plain(PeftModel.from_pretrained(base(kind), tmp_path).eval()), want, atol=1e-5)
    assert torch.allclose(
        plain(PeftModel.from_pretrained(base(kind), tmp_path, low_cpu_mem_usage=True).eval()), want, atol=1e-5
    )
    model = base(kind)
    model.load_adapter(str(tmp_path))
    assert torch.allclose(plain(model), want, atol=1e-5)


def test_peft_refusals():
    for spec, said in [
        ({"type": "verra"}, "did you mean 'vera'"),
        ({"type": "vera", "config": {"rr": 3, "target_module": ["x"]}}, "has no setting"),
        ({"type": "prefix_tuning"}, "num_virtual_tokens"),
        ({"type": "prompt_tuning"}, "num_virtual_tokens"),
        ({"type": "trainable_tokens"}, "token_indices"),
        ({"type": "adalora"}, "rank allocator"),
        ({"type": "lora", "config": {"init_lora_weights": "pissa"}}, "use tuner 'lora'"),
        ({"type": "luthier_ssf"}, "tuner: ssf"),
    ]:
        with pytest.raises(RecipeError, match=said):
            build("tuner", {"name": "peft", **spec})
