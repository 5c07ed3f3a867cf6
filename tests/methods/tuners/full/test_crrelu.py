"""crrelu: the activation's formula, one number at each place, and networks that are saved with it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from helpers.tuners import anywhere, base, logprobs, plain, put, train
from luthier.compat.activations import CRReLU
from luthier.errors import RecipeError
from luthier.registry import build


def test_the_activation_is_the_formula():
    x = torch.linspace(-4, 4, 41, dtype=torch.float64).add(0.01).requires_grad_()
    assert torch.equal(CRReLU(0.0).double()(x), x.relu())
    f = CRReLU(0.3).double()
    eps = f.eps.detach()
    (slope,) = torch.autograd.grad(f(x).sum(), x)
    expected = (x > 0) + eps * (1 - x**2) * torch.exp(-(x**2) / 2)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_block_has_one_more_number_that_learns(kind):
    model = base(kind)
    before = sum(p.numel() for p in model.parameters())
    attached = put("crrelu", model, activations_only=True)
    blocks = model.config.num_hidden_layers
    assert sum(p.numel() for p in model.parameters()) == before + blocks
    assert len(attached.param_groups()) == blocks
    logprobs(attached).sum().backward()
    assert all(p.grad.abs() > 0 for p in attached.parameters().values())
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(attached)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {group.name for group in attached.param_groups()}


def test_it_is_saved_and_loaded_with_the_network(tmp_path):
    attached, _ = anywhere("crrelu")
    train(attached)
    attached.save(tmp_path)
    again = build("architecture", "causal").load(str(tmp_path))
    assert torch.equal(plain(again.eval()), plain(attached.model))
    other = put("crrelu", copy.deepcopy(again))  # tuned further: it has the activation already
    assert torch.equal(plain(other.model), plain(again)), "with its numbers as they were tuned"


def test_a_network_that_names_no_activation_is_refused():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(RecipeError, match="does not name an activation"):
        put("crrelu", model)
