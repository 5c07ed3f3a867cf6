"""Keys and values before the text: as transformers' cache has them, in every layout, in encoders and while
writing.
"""

from __future__ import annotations

import pytest
import torch
import transformers as t

from helpers import zoo
from luthier.errors import RecipeError
from luthier.kernels.attention import attend, plain
from luthier.kernels.attention_plan import plan
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.tuners._peft import ADAPTER
from luthier.model.generate import Cached, Rereading, Sharing, _trial
from luthier.model.layout import lay_out
from luthier.registry import build

KINDS = ["llama", "qwen3", "gpt2", "gpt_neox", "qwen2_moe", "qwen2_sliding"]


def put(model, std: float = 0.7, **settings):
    """A prefix that is felt."""
    torch.manual_seed(2)
    attached = build("tuner", {"name": "prefix", "num_virtual_tokens": 3, **settings}).attach(model)
    with torch.no_grad():
        for p in attached.parameters().values():
            p.normal_(std=std)
    return attached


def kept(attached) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer."""
    return [layer.prefix_kv() for layer in attached.layers.values()]


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("projected", [False, True])
@torch.no_grad()
def test_it_is_what_a_cache_of_keys_and_values_says(kind, projected):
    """transformers alone, handed the same keys and values as its cache and the text's own positions."""
    model = zoo.make(kind)
    ids = torch.tensor([zoo.tokens(7, 1), zoo.tokens(7, 2)])
    attached = put(model, prefix_projection=projected)
    said = model(ids).logits
    size = getattr(model.config, "head_dim", None) or 32 // model.config.num_attention_heads
    cache = t.DynamicCache()
    for i, both in enumerate(kept(attached)):
        k, v = (x.view(3, -1, size).transpose(0, 1).expand(2, -1, -1, -1) for x in both)
        cache.update(k.contiguous(), v.contiguous(), i)
    with attached.off():
        positions = torch.arange(7).expand(2, -1)
        want = model(
            ids, past_key_values=cache, position_ids=positions, attention_mask=torch.ones(2, 10)
        ).logits
        bare = model(ids).logits
    torch.testing.assert_close(said, want, atol=1e-4, rtol=1e-4)
    assert (bare - said).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_answers_alike(kind):
    """Packed in blocks, under a mask, prompts shared or not, padded: the same numbers and the same
    gradients.
    """
    model, found = zoo.make(kind), []
    attached = put(model)
    for layout in (
        Causal(packing=False, share_prompts=False),
        Causal(),
        Causal(share_prompts=False),
        Causal(blocks=False),
    ):
        says = layout.forward(model, attached, zoo.rows()).logprobs
        grads = torch.autograd.grad(says.sum(), list(attached.parameters().values()))
        found.append((says.detach(), *grads))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-3, rtol=1e-3)
    assert all(g.abs().max() > 0 for g in found[0][1:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_there_while_the_network_writes(kind):
    model = zoo.make(kind)
    attached = put(model)
    slow = _trial(Rereading(model, attached))
    for way in (Sharing, Cached)[kind == "qwen2_sliding" :]:
        torch.testing.assert_close(_trial(way(model, attached)), slow, atol=1e-3, rtol=1e-3)
    with attached.off():
        assert (_trial(Cached(model, attached)) - slow).abs().max() > 0.01


def test_blocks_are_the_mask_by_hand_and_so_are_their_gradients():
    layout = lay_out(zoo.deep(), width=2**20)
    rows, width = layout.piece.shape
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64, requires_grad=True)
    q, k, v, ahead = (
        draw(rows, 4, width, 8),
        draw(rows, 2, width, 8),
        draw(rows, 2, width, 8),
        (draw(2, 5, 8), draw(2, 5, 8)),
    )
    how = plan(layout, torch.float64)
    given, weight = (q, k, v, *ahead), torch.randn(rows, width, 4, 8, generator=rng, dtype=torch.float64)
    both = [(f(q, k, v, how, 0.3, prefix=ahead) * weight).sum() for f in (attend, plain)]
    grads = [torch.autograd.grad(x, given, create_graph=True) for x in both]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(*grads)
    again = [torch.autograd.grad(sum(g.square().sum() for g in some), given) for some in grads]
    torch.testing.assert_close(*again)


@torch.no_grad()
def test_an_encoder_sees_it_from_every_place():
    """By hand: one layer's softmax over the prefix and the words that are no padding."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = t.BertModel(t.BertConfig(**sizes, initializer_range=0.3), add_pooling_layer=False).eval()
    attached = put(model)
    ids, mask = torch.arange(3, 13).view(2, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    own = model.encoder.layer[0].attention.self
    seen: list[torch.Tensor] = []
    hook = own.register_forward_hook(lambda m, given, out: seen.extend([given[0], out[0]]))
    model(input_ids=ids, attention_mask=mask)
    hook.remove()
    x, said = seen
    split = lambda y: y.view(*y.shape[:-1], 2, 8).transpose(-3, -2)
    keys, values = (split(y).expand(2, -1, -1, -1) for y in kept(attached)[0])
    k, v = torch.cat([keys, split(own.key(x))], 2), torch.cat([values, split(own.value(x))], 2)
    scores = split(own.query(x)) @ k.transpose(2, 3) / 8**0.5
    scores[..., 3:].masked_fill_(mask[:, None, None] == 0, -torch.inf)
    torch.testing.assert_close(
        said, (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-5
    )


def test_a_module_that_makes_no_keys_or_attention_of_another_kind_is_refused():
    with pytest.raises(RecipeError, match="a prefix is attached to key projections"):
        put(zoo.make("llama"), target_modules=["v_proj"])
    t5 = t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    for model in (zoo.make("llama", attention="eager"), t5):
        with pytest.raises(RecipeError, match="accepts no keys and values before the text"):
            put(model)


def test_counts_and_names():
    attached = put(zoo.make("llama"))
    # layers, vectors, keys and values, width of 2 heads
    assert sum(p.numel() for p in attached.parameters().values()) == 2 * 3 * 2 * 16
    assert all(".k_proj" in s.name and set(s.params) == {"keys", "values"} for s in attached.param_groups())
    assert all(ADAPTER in layer.adapter_params for layer in attached.layers.values())
