"""The fast paths against their plain twins: log-probabilities in chunks, and the packed layout's tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import zoo
from luthier.kernels import logprobs as kernel
from luthier.kernels.logprobs import Head, chunked, plain
from luthier.model.outputs import Outputs

T, D, V = 37, 16, 61


FORMS = {
    "plain": {},
    "bias": {"with_bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"with_bias": True, "scale": 1.7, "softcap": 3.0, "further": True},
    "further bias": {"further": True},
}


def case(with_bias=False, scale=1.0, softcap=0.0, further=False, dtype=torch.float32, n=T, vocabulary=V):
    torch.manual_seed(0)
    module = nn.Linear(D, vocabulary, bias=with_bias)
    nn.init.normal_(module.weight)
    hidden = torch.randn(n, D).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (n,))
    return (
        hidden,
        Head(module.to(dtype), scale, softcap, torch.randn(vocabulary) if further else None),
        labels,
    )


def gradients(values, hidden, head):
    moved = [x for x in (hidden, *head.module.parameters()) if x.requires_grad]
    return torch.autograd.grad((values * torch.linspace(-1, 2, len(values))).sum(), moved)


# into chunks and blocks, even and uneven, or not at all
CUT = [(16, 8192), (17, 1), (1000, 60), (1000, 8192)]


@pytest.mark.parametrize(("tokens", "words"), CUT)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_chunked_is_the_plain_twin(form, frozen, tokens, words, monkeypatch):
    """Blocks end at multiples of 64 words, so the longer vocabulary has several of them."""
    V = 61 if words == 8192 else 333
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 4 * min(V, -(-words // 64) * 64) * tokens)
    monkeypatch.setattr(kernel, "WORDS", words)
    hidden, head, labels = case(**FORMS[form], vocabulary=V)
    head.module.requires_grad_(not frozen)
    fast, slow = chunked(hidden, head, labels), plain(hidden, head, labels)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    for got, want in zip(gradients(fast, hidden, head), gradients(slow, hidden, head), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_each_gradient_alone(frozen):
    hidden, head, labels = case(with_bias=True)
    {"hidden": hidden, "weight": head.module.weight, "bias": head.module.bias}[frozen].requires_grad_(False)
    fast, slow = (gradients(way(hidden, head, labels), hidden, head) for way in (chunked, plain))
    for got, want in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_tokens(frozen):
    hidden, head, labels = case(n=0)
    head.module.requires_grad_(not frozen)
    out = chunked(hidden, head, labels)
    out.sum().backward()
    assert out.shape == (0,) and hidden.grad.shape == (0, D)
    outputs = Outputs(hidden, head, labels)
    assert outputs.entropy.shape == (0,) and outputs.top(3)[1].shape == (0, 3)


@pytest.mark.parametrize("frozen", [False, True])
def test_half_precision_is_as_good_as_the_plain_twin_in_it(frozen):
    hidden, head, labels = case(dtype=torch.bfloat16)
    exact_hidden, exact, _ = case()
    exact_hidden.data, exact.module.weight.data = hidden.data.float(), head.module.weight.data.float()
    head.module.requires_grad_(not frozen)
    exact.module.requires_grad_(not frozen)
    fast, slow, want = (
        chunked(hidden, head, labels),
        plain(hidden, head, labels),
        plain(exact_hidden, exact, labels),
    )
    assert fast.dtype == torch.float32
    assert (fast - want).abs().max() <= (slow - want).abs().max() + 1e-3
    triple = zip(
        gradients(fast, hidden, head),
        gradients(slow, hidden, head),
        gradients(want, exact_hidden, exact),
        strict=True,
    )
    for got, other, true in triple:
        assert got.dtype == torch.bfloat16
        assert (got.float() - true).abs().max() <= 1.5 * (other.float() - true).abs().max() + 1e-2


def test_a_normaliser_is_found_where_no_probability_of_the_first_words_is_above_zero():
    z = torch.full((3, 100), -150.0)
    z[:, 80], z[1, :50], z[2, 3] = 5.0, -60.0, 7.0
    torch.testing.assert_close(
        kernel.normaliser(z, z.softmax(-1)), z.logsumexp(-1, keepdim=True), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(
        kernel.normaliser(z[1:], z[1:].softmax(-1)), z[1:].logsumexp(-1, keepdim=True), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("words", [1, 8192])
def test_of_a_label_that_is_nearly_sure_the_slope_is_not_rounded_away(words, monkeypatch):
    """bf16 knows no number between 0.996 and 1."""
    monkeypatch.setattr(kernel, "WORDS", words)
    hidden, head, labels = case(dtype=torch.bfloat16, vocabulary=150)
    head.module.requires_grad_(False)
    hidden.data = head.module.weight[labels] * 1.5
    out = chunked(hidden, head, labels)
    sure = (out > -0.004) & (out < -1e-4)
    assert sure.sum() > 5
    got = gradients(out, hidden, head)[0].float()
    want = gradients(
        plain(exact := hidden.detach().float().requires_grad_(), Head(head.module.float()), labels),
        exact,
        head,
    )[0]
    assert ((got - want)[sure].norm(dim=1) < 0.15 * want[sure].norm(dim=1)).all()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(form, frozen):
    """A gradient penalty: what the gradient of a gradient's norm is."""
    hidden, head, labels = case(**FORMS[form])
    head.module.requires_grad_(not frozen)
    both = []
    for way in (chunked, plain):
        (g,) = torch.autograd.grad(
            (way(hidden, head, labels) * torch.linspace(-1, 2, T)).sum(), hidden, create_graph=True
        )
        moved = [hidden] if frozen else [hidden, head.module.weight]
        both.append(torch.autograd.grad(g.square().sum(), moved))
    for got, want in zip(*both, strict=True):
        assert want.abs().sum() > 0
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("frozen", [False, True])
def test_the_table_of_all_logits_never_exists(frozen, monkeypatch):
    """The largest tensor that is made while T * V would be 2,000 * 5,003."""
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 4 * 5003 * 50)
    hidden, head, labels = case(n=2000, vocabulary=5003)
    head.module.requires_grad_(not frozen)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(
                x.numel() for x in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(x)
            )
            return out

    with Watch():
        chunked(hidden, head, labels).sum().backward()
        outputs = Outputs(hidden, head, labels)
        (outputs.entropy.sum() + outputs.at(labels[:, None]).sum() + outputs.top(5)[0].sum()).backward()
    assert len(seen) > 100 and max(seen) <= 5003 * 50


@pytest.mark.parametrize("form", FORMS)
def test_outputs_answer_every_question_together(form, monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 4 * V * 16)
    hidden, head, labels = case(**FORMS[form])
    teacher_hidden, teacher, _ = case(scale=0.5)
    teacher_hidden = teacher_hidden.detach() * 2
    logits, other = head(hidden), teacher(teacher_hidden).detach()
    logp = logits.log_softmax(-1)
    some = torch.randint(V, (T, 3))

    outputs, beside = Outputs(hidden, head, labels), Outputs(teacher_hidden, teacher, labels)
    want = {
        "logprobs": logp.gather(1, labels[:, None]).squeeze(1),
        "entropy": -(logp.exp() * logp).sum(-1),
        "at": logp.gather(1, some).sum(1),
        "top": logp.topk(4).values.sum(1),
        "divergence": (other.softmax(-1) * (other.log_softmax(-1) - logp)).sum(-1),
    }
    got = {
        "logprobs": outputs.logprobs,
        "entropy": outputs.entropy,
        "at": outputs.at(some).sum(1),
        "top": outputs.top(4)[0].sum(1),
        "divergence": outputs.apply(
            lambda z, y: (y.softmax(-1) * (y.log_softmax(-1) - z.log_softmax(-1))).sum(-1), beside=[beside]
        ),
    }
    assert torch.equal(outputs.top(4)[1], logp.topk(4).indices) and outputs.logprobs is got["logprobs"]
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(
        gradients(sum(got.values()), hidden, head), gradients(sum(want.values()), hidden, head), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_wrapped_head_is_asked_as_it_is():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + x.sum(-1, keepdim=True) * torch.arange(V) / V

    hidden, head, labels = case()
    odd = Head(Wrapped(head.module))
    assert head.linear and not odd.linear
    torch.testing.assert_close(Outputs(hidden, odd, labels).logprobs, plain(hidden, odd, labels))
    handle = head.module.register_forward_hook(lambda m, i, o: o * 2)
    assert not head.linear
    torch.testing.assert_close(Outputs(hidden, head, labels).logprobs, plain(hidden, head, labels))
    handle.remove()


def test_head_scale_and_cap_are_measured():
    from luthier.model.language_model import head_of

    told = {
        "llama": (1.0, 0.0),
        "cohere": (0.25, 0.0),
        "granite": (0.25, 0.0),
        "gemma2": (1.0, 5.0),
        "recurrent_gemma": (1.0, 5.0),
    }
    for name, (scale, cap) in told.items():
        head = head_of(zoo.make(name), {"input_ids": torch.ones(1, 2, dtype=torch.long)})
        assert (head.scale, head.softcap) == (pytest.approx(scale, rel=1e-6), cap) and head.bias is None
