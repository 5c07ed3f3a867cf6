"""DePT and EPT: reductions to prompt tuning, numbers, and one change of prompts in every way of reading."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

from helpers.tuners import IDS, base, batch, logprobs, put, train
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.model.generate import Cached, Rereading, Sharing, generate
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.train.optimizer import Chain


def tuned(name="dept", **settings):
    """After the change is no longer zero."""
    attached = put(name, **{"max_prompt_length": 8, "r": 4, **settings})
    with torch.no_grad():
        attached.B.normal_(generator=torch.Generator().manual_seed(3))
    return attached


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"r": 0}], ids=["zero pair", "no pair"])
def test_without_the_pair_dept_is_prompt_tuning(settings):
    attached, prompt = put("dept", **settings), put("prompt")
    prompt.prompt.copy_(attached.prompt)
    assert torch.equal(logprobs(attached), logprobs(prompt))
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = get_peft_model(base(), config)
    theirs.prompt_encoder["default"].embedding.weight.copy_(attached.prompt)
    theirs.eval()
    with_prompt = torch.cat(
        [attached.prompt.expand(2, -1, -1), attached.model.get_input_embeddings()(IDS)], 1
    )
    assert torch.allclose(theirs(IDS).logits, attached.model(inputs_embeds=with_prompt).logits, atol=1e-5)


@torch.no_grad()
def test_numbers_and_lengths_are_the_formulas(tmp_path):
    attached = tuned()
    width = 32
    assert sum(p.numel() for p in attached.parameters().values()) == 3 * width + 4 * (8 + width)
    assert attached.settings.numbers(width) == 3 * width + 4 * (8 + width)
    arch = Causal()
    longer, shorter = put("prompt", num_virtual_tokens=9), attached
    sizes = [arch.layout(m.model, m, batch(), False).source.numel() for m in (longer, shorter)]
    prompts = 2
    assert sizes[0] - sizes[1] == prompts * (9 - 3)
    nothing = put("dept", num_virtual_tokens=0)
    assert torch.allclose(logprobs(nothing), logprobs(_untuned()), atol=1e-6)
    # the plain form gives the same logits without this class
    attached.export_plain(tmp_path)
    plain = load_file(tmp_path / "prompt.safetensors")
    embed = attached.model.get_input_embeddings()(IDS[:1]) + plain["added"][: IDS.shape[1]]
    logits = attached.model(inputs_embeds=torch.cat([plain["prompt"][None], embed], 1)).logits
    own = Rereading(attached.model, attached)
    assert torch.allclose(own.begin([IDS[0].tolist()], 1), logits[:, -1], atol=1e-5)


def _untuned():
    from luthier.methods.tuners._base import Untuned

    return Untuned(base())


@torch.no_grad()
@pytest.mark.parametrize("name", ["dept", "ept"])
@pytest.mark.parametrize("virtual", [0, 3])
def test_every_way_of_reading_changes_the_prompt_alike(name, virtual):
    attached = tuned(name, num_virtual_tokens=virtual) if name == "dept" or virtual else tuned(name)
    model, one = attached.model, batch()
    packed = Causal().forward(model, attached, one).logprobs
    padded = replace(Causal(), packing=False, share_prompts=False).forward(model, attached, one).logprobs
    assert torch.allclose(packed, padded, atol=1e-5)
    assert not torch.allclose(packed, logprobs(_untuned()), atol=1e-2)
    alone = [Causal().alone(model, attached, one, s, own) for s, own in _targets(one)]
    assert torch.allclose(torch.cat(alone), packed, atol=1e-5)
    # a prompt is changed, its answer is not, whoever writes it
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17]]
    written = []
    for writer in (Rereading, Cached, Sharing):
        written.append(
            generate(writer(model, attached), prompts, seeds=[0, 1], n=2, max_new_tokens=5, temperature=0.0)
        )
    assert written[0] == written[1] == written[2]


def _targets(one):
    for s in one.completion.tolist():
        own = one.targets[one.segment[one.targets] == s]
        yield s, own


def test_an_encoder_reads_the_changed_prompt():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    attached = build("tuner", {"name": "dept", "num_virtual_tokens": 2, "r": 3}).attach(model)
    arch = build("architecture", "seq2seq")
    before = arch.forward(model, attached, batch()).logprobs
    before.sum().backward()
    assert attached.B.grad.abs().max() > 0 and attached.prompt.grad.abs().max() > 0
    with torch.no_grad():
        attached.B.normal_()
        assert not torch.allclose(arch.forward(model, attached, batch()).logprobs, before)
        assert arch.generate(model, attached, [[5, 6]], seeds=[0], max_new_tokens=2)


def test_parts_have_rates_of_their_own():
    recipe = Recipe.load({"tuner": "dept", "learning_rate": {"default": 5e-4, "prompt": 0.3, "lora_B": 1e-3}})
    assert recipe.learning_rate == 5e-4
    assert Recipe.load(recipe.yaml()).learning_rates == {"prompt": 0.3, "lora_B": 1e-3}
    attached = put("dept")
    clock = Clock(total=1)
    chain = Chain([*build_chain(recipe)], attached, clock, recipe.learning_rate)
    before = attached.tensors()
    chain.step(
        {g.name: {k: torch.ones_like(p) for k, p in g.params.items()} for g in attached.param_groups()}
    )
    moved = {k: float((v - before[k]).abs().max()) for k, v in attached.tensors().items()}
    assert moved["prompt.embeddings"] == pytest.approx(0.3, rel=1e-3)
    assert moved["input.A"] == pytest.approx(5e-4, rel=1e-2)
    assert moved["input.B"] == pytest.approx(1e-3, rel=1e-3)
    odd = Recipe.load({"tuner": "dept", "learning_rate": {"default": 1e-3, "promt": 1.0}})
    with pytest.raises(RecipeError, match="did you mean 'prompt'"):
        Chain([*odd.chain()], attached, clock, 1e-3)
    with pytest.raises(RecipeError, match="must not be 0"):
        Recipe.load({"learning_rate": {"default": 0, "B": 1.0}}).chain()


def build_chain(recipe):
    """Adam and the rates, without clipping and decay."""
    return [build("transform", "adam"), recipe.chain()[-1]]


@torch.no_grad()
def test_ept_without_its_parts_is_prompt_tuning():
    attached, prompt = put("ept", spaces=1), put("prompt")
    prompt.prompt.copy_(attached.prompt)
    assert torch.allclose(logprobs(attached), logprobs(prompt), atol=1e-6)
    own = sum(p.numel() for p in attached.parameters().values())
    assert own == attached.settings.numbers(32)
    settings = build("tuner", {"name": "ept", "num_virtual_tokens": 40, "r": 18, "bottleneck": 8})
    assert settings.numbers(768) <= 100 * 768
    sizes = SimpleNamespace(virtual=attached.virtual, rows=len(attached.soft()))
    assert sizes.virtual == sizes.rows == 3


def test_epts_gate_sums_to_one_and_leaves_uniform():
    attached = put("ept", spaces=3)
    was = attached.weights(attached.fused()).detach()
    assert torch.allclose(was, torch.full((3,), 1 / 3))
    train(attached, steps=6, rate=0.05)
    now = attached.weights(attached.fused()).detach()
    assert float(now.sum()) == pytest.approx(1, abs=1e-6)
    assert float((now - 1 / 3).abs().max()) > 0.02
