"""peft: plain peft and transformers load it; any peft type; refusals."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from helpers.tuners import IDS, anywhere, base, each, logprobs, plain, put, train
from luthier.errors import RecipeError
from luthier.methods.tuners._base import Untuned
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


OTHERS = {
    "vera": {"r": 8},
    "ia3": {},
    "loha": {"r": 4},
    "boft": {"boft_block_size": 4},
    "hra": {"r": 4},
    "delora": {"r": 4},
}


@pytest.mark.parametrize("kind, settings", OTHERS.items())
@torch.no_grad()
def test_any_peft_type(kind, settings, tmp_path):
    attached = put("peft", type=kind, config={**settings, "target_modules": ["q_proj", "v_proj"]})
    with torch.enable_grad():
        train(attached)
    tuned = logprobs(attached)
    with attached.off():
        assert torch.equal(logprobs(attached), logprobs(Untuned(base())))
    with attached.merged():
        assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
    assert torch.equal(logprobs(attached), tuned)
    attached.save(tmp_path)
    again = build("tuner", attached.settings).attach(base())
    again.load(again.read(tmp_path))
    assert torch.allclose(logprobs(again), tuned, atol=1e-6)


def test_peft_refusals():
    for spec, said in [
        ({"type": "verra"}, "did you mean 'vera'"),
        ({"type": "vera", "config": {"rr": 3, "target_module": ["x"]}}, "has no setting"),
        ({"type": "prefix_tuning"}, "use tuner 'prompt'"),
        ({"type": "prompt_tuning"}, "use tuner 'prompt'"),
        ({"type": "adalora"}, "rank allocator"),
        ({"type": "lora", "config": {"init_lora_weights": "pissa"}}, "use tuner 'lora'"),
        ({"type": "luthier_ssf"}, "tuner: ssf"),
    ]:
        with pytest.raises(RecipeError, match=said):
            build("tuner", {"name": "peft", **spec})
