"""Attention block by block against its plain twin: values, gradients, what is kept apart, who gets it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers import zoo
from luthier.compat.transformers import checkpoint_activations
from luthier.kernels import _switch, attention, attention_plan
from luthier.kernels.decode_attention import Decoding, attend_one_token
from luthier.methods.tuners._base import Untuned
from luthier.model.batch import collate
from luthier.model.layout import lay_out
from luthier.model.policy import Policy
from luthier.registry import build
from luthier.train import checks as guards

CAUSAL = build("architecture", "causal")


def uneven():
    """Long sequences beside short ones: several blocks each, shared prompts of many completions."""
    sizes = [(70, [9]), (3, [40, 5, 17, 2, 30, 11]), (1, [1]), (20, [60, 61])]
    rows = [
        {
            "id": str(g),
            "encoded": SimpleNamespace(
                prompt=[5] * p, completions=[[6] * c for c in cs], supervised=[[True] * c for c in cs]
            ),
        }
        for g, (p, cs) in enumerate(sizes)
    ]
    return collate(rows, lambda row: row["encoded"])


BATCHES = {"rows": zoo.rows, "deep": zoo.deep, "uneven": uneven}


def asked(layout, dtype=torch.float32, heads=6, kv=2, size=8):
    g = torch.Generator().manual_seed(0)
    r, w = layout.source.shape
    made = [torch.randn(r, h, w, size, generator=g).to(dtype).requires_grad_() for h in (heads, kv, kv)]
    return made, torch.randn(r, w, heads, size, generator=g).to(dtype)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    "virtual, share, width",
    [(0, True, 10**6), (3, True, 10**6), (0, False, 10**6), (2, True, 0), (0, False, 100)],
)
@pytest.mark.parametrize("reach", [(None, None), (7, None), (None, 16)])
@pytest.mark.parametrize("batch", BATCHES)
def test_blocks_are_the_plain_twin(batch, reach, virtual, share, width, kept, monkeypatch):
    """Values and the gradients of query, key and value, with blocks so short that everything is cut."""
    monkeypatch.setattr(attention_plan, "QUERIES", 16)
    monkeypatch.setattr(attention_plan, "WHOLE", 8)
    monkeypatch.setattr(attention, "KEEP", 10**6 if kept else 0)
    layout = lay_out(BATCHES[batch](), share=share, width=width, virtual=virtual)
    how = attention_plan.plan(layout, torch.float32, *reach)
    real = layout.piece.flatten() >= 0
    queries = torch.cat([g.queries.flatten()[g.to_queries < len(real)] for g in how.groups])
    assert sorted(queries.tolist()) == real.nonzero().squeeze(1).tolist()  # every token asks once
    inputs, weight = asked(layout)
    want = attention.plain(*inputs, how, 0.3)
    for way in (attention.attend, attention._composed):
        got = way(*inputs, how, 0.3)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        pairs = zip(
            *(torch.autograd.grad((x * weight).sum(), inputs, retain_graph=True) for x in (got, want)),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bf16_is_within_its_rounding():
    layout = lay_out(uneven(), width=10**6)
    how, exact = (attention_plan.plan(layout, t) for t in (torch.bfloat16, torch.float32))
    inputs, weight = asked(layout, torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    got, want = attention.attend(*inputs, how, 0.3), attention.plain(*wide, exact, 0.3)
    assert got.dtype == torch.bfloat16 and (got.float() - want).abs().max() < 0.03
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((want * weight.float()).sum(), wide),
        strict=True,
    ):
        assert (a.float() - b).norm() < 0.01 * b.norm()


def test_second_and_forward_derivatives():
    layout = lay_out(zoo.rows(), width=10**6)
    how = attention_plan.plan(layout, torch.float32)
    inputs, weight = asked(layout)
    both = []
    for way in (attention.attend, attention.plain):
        (g,) = torch.autograd.grad((way(*inputs, how, 0.3) * weight).sum(), inputs[:1], create_graph=True)
        both.append(torch.autograd.grad(g.square().sum(), inputs))
    for a, b in zip(*both, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    ahead = [
        torch.func.jvp(lambda q, way=way: way(q, *inputs[1:], how, 0.3), (inputs[0],), (inputs[0],))[1]
        for way in (attention.attend, attention.plain)
    ]
    torch.testing.assert_close(*ahead, atol=1e-5, rtol=1e-4)


@pytest.mark.long
def test_dropout_is_that_of_operations_torch_differentiates(monkeypatch):
    """The same numbers are left out in values, gradients and second derivatives; and on average, nothing
    is.
    """
    monkeypatch.setattr(attention_plan, "QUERIES", 16)
    layout = lay_out(uneven(), width=10**6)
    how = attention_plan.plan(layout, torch.float32)
    inputs, weight = asked(layout)
    both = []
    for way in (attention.attend, attention._composed):
        torch.manual_seed(0)
        with _switch.always():
            out = way(*inputs, how, 0.3, 0.25)
        first = torch.autograd.grad((out * weight).sum(), inputs, create_graph=True)
        both.append([out, *first, *torch.autograd.grad(first[0].square().sum(), inputs)])
        plainly = torch.autograd.grad((way(*inputs, how, 0.3) * weight).sum(), inputs)
        assert not torch.allclose(first[0], plainly[0], atol=1e-2)
        torch.manual_seed(0)
        with _switch.always():
            again = way(*inputs, how, 0.3, 0.25)
        # the closed form, not what is differentiated twice
        both[-1] += torch.autograd.grad((again * weight).sum(), inputs)
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        mean = sum(attention.attend(*inputs, how, 0.3, 0.25) for _ in range(200)) / 200
        assert (mean - attention.attend(*inputs, how, 0.3)).abs().mean() < 0.05


def test_nothing_is_computed_for_what_a_mask_would_hide():
    """64 sequences of 32: a 64th of the scores that a mask over the row would need, with no padding."""
    rows = [
        {
            "id": str(k),
            "e": SimpleNamespace(prompt=[5] * 20, completions=[[6] * 12], supervised=[[True] * 12]),
        }
        for k in range(64)
    ]
    layout = lay_out(collate(rows, lambda r: r["e"]), width=10**6)
    how = attention_plan.plan(layout, torch.float32)
    assert sum(g.queries.numel() * g.keys.shape[1] for g in how.groups) == 64 * 32 * 32
    assert all(g.ranges is None for g in how.groups)
    long = attention_plan.plan(lay_out(collate(_one(2048), lambda r: r["e"]), width=1), torch.float32)
    assert sum(g.queries.numel() * g.keys.shape[1] for g in long.groups) < 0.6 * 2048**2


def _one(size):
    return [
        {
            "id": "0",
            "e": SimpleNamespace(prompt=[5] * (size - 9), completions=[[6] * 9], supervised=[[True] * 9]),
        }
    ]


# attention of their own, or none
OWN = {"falcon", "gpt_neo", "bloom", "falcon_alibi", "mamba", "recurrent_gemma", "lfm2"}


EAGER = {"gemma2"}  # what transformers gives them where nothing else is asked for


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_who_gets_it(name):
    """Every family that asks transformers for its attention does; the model's own reading stays what it
    was.
    """
    model, ids, told = zoo.make(name), torch.tensor([zoo.tokens(9, 1)]), []
    before = model(input_ids=ids, use_cache=False).logits
    policy = Policy(CAUSAL, model, Untuned(model))
    guards.check_forward(policy, zoo.rows(), told.append)
    with torch.no_grad():
        policy.logprobs(zoo.rows())
    assert (model.config._attn_implementation == attention.NAME and policy.architecture.blocks) == (
        name not in OWN | EAGER
    ), told
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_a_network_that_does_not_ask_is_found_out(monkeypatch):
    """Its attention would see other sequences, were the mask simply lost."""
    model, told = zoo.make("falcon"), []
    monkeypatch.setattr(attention, "takes_plans", lambda model: True)
    policy = Policy(CAUSAL, model, Untuned(model))
    guards.check_forward(policy, zoo.rows(), told.append)
    assert not policy.architecture.blocks and policy.architecture.packing and told


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_checkpointing_computes_the_same_again(name):
    model, batch = zoo.make(name), zoo.rows()
    model.requires_grad_(True).train()
    for m in model.modules():
        m.p = 0.0 if isinstance(m, torch.nn.Dropout) else getattr(m, "p", None)
    if name == "gpt2":
        model.config.attn_pdrop = 0.0
    grads = []
    for _ in range(2):
        loss = CAUSAL.forward(model, Untuned(model), batch).logprobs.sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
        checkpoint_activations(model)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_saved_config_says_nothing_of_it(tmp_path):
    model = zoo.make("llama")
    CAUSAL.forward(model, Untuned(model), zoo.rows())
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("heads", [2, 6])
def test_one_token_of_each_sample_is_what_sdpa_says(heads):
    """Two prompts of 5 and 3 tokens, three samples each of which one has ended, four own tokens."""
    generator = torch.Generator().manual_seed(0)
    some = lambda *shape: torch.randn(*shape, generator=generator)
    q, prompt, own = (
        some(5, 6, 1, 8),
        (some(2, heads, 5, 8), some(2, heads, 5, 8)),
        [some(5, heads, 4, 8) for _ in "kv"],
    )
    read = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    written = Decoding(torch.arange(6), 3, read).keep(torch.tensor([0, 1, 2, 3, 5]))[0]
    own[0].prompt = prompt
    said = attend_one_token(q, *own, written, 0.3)
    of = torch.tensor([0, 0, 0, 1, 1])
    k, v = (torch.cat([p[of], o], 2) for p, o in zip(prompt, own, strict=True))
    mask = torch.cat([read[of], torch.ones(5, 4, dtype=torch.bool)], 1)[:, None, None]
    assert torch.allclose(
        said,
        torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True),
        atol=1e-6,
    )
    left, prompts = written.keep(torch.tensor([3, 4]))
    assert (
        prompts.tolist() == [1]
        and left.sequence.tolist() == [0, 2]
        and left.prompt_mask.tolist() == [[False] * 2 + [True] * 3]
    )
