"""bottleneck: as many numbers move as the formula says; adapters stand where the papers put them."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPTJConfig,
    GPTJForCausalLM,
    HubertConfig,
    HubertModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from helpers import zoo
from helpers.tuners import base, put
from luthier.errors import RecipeError


@pytest.mark.parametrize(
    "name, formula",
    [
        ("lora", lambda out, in_: 4 * (out + in_)),
        ("lora_sb", lambda out, in_: 16),
        ("loldu", lambda out, in_: 5),
        ("spiel", lambda out, in_: max(1, round(0.01 * out * in_))),
        ("ssf", lambda out, in_: 2 * out),
        ("dsee", lambda out, in_: 4 * (out + in_) + 64),
        ("parallel_adapter", lambda out, in_: max(1, round(in_ / 16)) * (in_ + 1 + out) + out),
    ],
)
def test_as_many_numbers_move_as_the_formula_says(name, formula):
    attached = put(name)
    shapes = [layer.get_base_layer().weight.shape for layer in attached.layers.values()]
    assert sum(p.numel() for p in attached.parameters().values()) == sum(formula(*s) for s in shapes)


@torch.no_grad()
def test_adapters_stand_where_the_papers_put_them():
    for kind, attention, ffn in (("llama", "o_proj", "down_proj"), ("gpt2", "attn.c_proj", "mlp.c_proj")):
        both, one = put("houlsby", base(kind)).layers, put("pfeiffer", base(kind)).layers
        assert len(both) == 4 and all(n.endswith((attention, ffn)) for n in both)
        assert len(one) == 2 and all(n.endswith(ffn) for n in one)
    attached, x = put("houlsby", reduction_factor=8), torch.randn(3, 32)
    layer = attached.layers["model.layers.0.self_attn.o_proj"]
    p = layer.tensors("default")
    p.up.normal_(), p.up_bias.normal_()
    y = layer.base_layer(x)
    assert torch.allclose(layer(x), y + (y @ p.down.T + p.down_bias).relu() @ p.up.T + p.up_bias, atol=1e-5)
    with pytest.raises(RecipeError, match="has no LoRA form"):
        attached.export_lora("/nowhere")


def t5():
    shape = dict(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(T5Config(**shape))


def bart():
    sizes = dict(encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    return BartForConditionalGeneration(BartConfig(vocab_size=97, d_model=32, **sizes, **heads))


def phi():
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    return PhiForCausalLM(PhiConfig(**shape, num_attention_heads=4, bos_token_id=1, eos_token_id=1))


def gptj():
    return GPTJForCausalLM(
        GPTJConfig(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=1, eos_token_id=1
        )
    )


def distilbert():
    shape = dict(vocab_size=97, dim=32, hidden_dim=64, n_layers=2, n_heads=4)
    return DistilBertForMaskedLM(DistilBertConfig(**shape))


def albert():
    shape = dict(vocab_size=97, embedding_size=32, hidden_size=32, intermediate_size=64)
    return AlbertForMaskedLM(AlbertConfig(**shape, num_hidden_layers=2, num_attention_heads=4))


def modernbert():
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    return ModernBertForMaskedLM(ModernBertConfig(**shape, **special, num_attention_heads=4))


SOUND = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    conv_dim=(8, 8),
    conv_stride=(5, 4),
    conv_kernel=(10, 8),
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
)


def wav2vec2():
    return Wav2Vec2Model(Wav2Vec2Config(**SOUND))


def hubert():
    return HubertModel(HubertConfig(**SOUND))


FAMILIES = {  # network -> ends of attention, and how many; ends of feed-forward, and how many
    t5: (".o", 6, ".wo", 4),
    bart: ("attn.out_proj", 6, "fc2", 4),
    phi: ("self_attn.dense", 2, "mlp.fc2", 2),
    gptj: ("attn.out_proj", 2, "mlp.fc_out", 2),
    distilbert: ("attention.out_lin", 2, "ffn.lin2", 2),
    albert: ("attention.dense", 1, "ffn_output", 1),  # its layers share one module
    modernbert: ("attn.Wo", 2, "mlp.Wo", 2),
    wav2vec2: ("attention.out_proj", 2, "feed_forward.output_dense", 2),
    hubert: ("attention.out_proj", 2, "feed_forward.output_dense", 2),
}


@pytest.mark.parametrize("network", FAMILIES, ids=lambda f: f.__name__)
def test_both_places_are_found_in_every_family(network):
    attention, n, ffn, m = FAMILIES[network]
    for name in ("houlsby", "compacter"):
        attached = put(name, network(), reduction_factor=4)
        assert sum(k.endswith(attention) for k in attached.layers) == n
        assert sum(k.endswith(ffn) for k in attached.layers) == m
        assert len(attached.layers) == n + m and not attached.warnings
    one = put("pfeiffer", network(), reduction_factor=4)
    assert len(one.layers) == m and all(k.endswith(ffn) for k in one.layers)


def test_a_tuner_that_finds_half_of_its_places_says_so():
    model = base()
    for layer in model.model.layers:
        layer.self_attn.weigh = layer.self_attn.o_proj
        del layer.self_attn.o_proj
    (sentence,) = put("houlsby", model).warnings
    assert "no matrix that ends attention in 2 of the 2 layers of LlamaForCausalLM" in sentence
    (sentence,) = put("houlsby", zoo.make("mixtral")).warnings
    assert "finds no matrix that ends feed-forward" in sentence and "target_parameters" in sentence
    with pytest.raises(RecipeError, match="does not know the modules of Sequential"):
        put("houlsby", torch.nn.Sequential(torch.nn.Linear(4, 4)))
