"""Token windows: gradients are those of the whole text, and less stays in memory."""

from __future__ import annotations

import pytest
import torch

from helpers.models import make_llama
from luthier.errors import RecipeError
from luthier.registry import build
from luthier.train.token_windows import WindowedText

IDS = [5, 40, 77, 12, 200, 33, 90, 61, 150, 8, 44]
WEIGHTS = [0, 0, 0, 1, 1, 0.5, 1, 1, 0, 1, 1]


def tuned(**settings):
    """A tiny Llama with a LoRA whose B is not zero, and what trains."""
    model = make_llama()
    own = build("tuner", {"name": "lora", "r": 4, "target_modules": "all-linear", **settings}).attach(model)
    torch.manual_seed(1)
    parameters = own.parameters()
    with torch.no_grad():
        for p in parameters.values():
            p.copy_(0.1 * torch.randn_like(p))
    return model, parameters


def plain(model, parameters):
    """(loss, gradients, bytes that autograd stores) of the whole text at once."""
    stored: dict[int, int] = {}
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(x):
        if x.data_ptr() not in weights:
            stored[x.data_ptr()] = max(stored.get(x.data_ptr(), 0), x.nbytes)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(IDS[1:]), reduction="none")
        loss = losses @ torch.tensor(WEIGHTS[1:])
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return float(loss.detach()), dict(zip(parameters, grads, strict=True)), sum(stored.values())


@pytest.mark.parametrize("sizes", [[1] * 11, [4, 4, 3], [2, 7, 1, 1], [11]])
def test_gradients_are_those_of_the_whole_text(sizes):
    model, parameters = tuned()
    loss, grads, stored = plain(model, parameters)
    text = WindowedText(model, IDS, WEIGHTS)
    for size in sizes:
        text.read(size)
    assert text.complete
    assert text.bytes < 0.5 * stored
    units = list(text.backward())
    assert len(units) == len(sizes) * 5
    assert text.loss == pytest.approx(loss, rel=1e-5)
    for name, p in parameters.items():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_layers_below_the_lowest_that_trains_are_left_out():
    model, parameters = tuned(layers_to_transform=[2, 3])
    _, grads, _ = plain(model, parameters)
    text = WindowedText(model, IDS, WEIGHTS)
    text.read(4)
    text.read(99)
    assert len(list(text.backward())) == 2 * 3
    for name, p in parameters.items():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-5)


def test_dropout_is_refused():
    model, _ = tuned()
    model.config.attention_dropout = 0.1
    with pytest.raises(RecipeError, match="dropout"):
        WindowedText(model.train(), IDS, WEIGHTS)
