"""The last MLP reads what is asked for and nothing else: the same answers and gradients, and whoever listens
hears everything.
"""

from __future__ import annotations

import pytest
import torch

from helpers import zoo
from luthier.kernels import sparse_mlp
from luthier.methods.tuners._base import Untuned
from luthier.model.anatomy import last_mlp
from luthier.registry import build

CAUSAL = build("architecture", "causal")


def said(model, batch):
    out = CAUSAL.forward(model, Untuned(model), batch).logprobs
    moving = [p for p in model.parameters() if p.requires_grad]
    return out.detach(), torch.autograd.grad(out.sin().sum(), moving, allow_unused=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi", "qwen2_moe"])
def test_answers_and_gradients_are_those_of_the_network_as_it_is(name, monkeypatch):
    model, batch = zoo.make(name).requires_grad_(True).eval(), zoo.rows()
    with monkeypatch.context() as whole:
        whole.setattr(sparse_mlp, "MOST", 0.0)
        want = said(model, batch)
    found, heard = last_mlp(model), []
    assert found is not None
    forward = type(found[1]).forward
    monkeypatch.setattr(
        type(found[1]), "forward", lambda self, x: heard.append((self, x.shape)) or forward(self, x)
    )
    got = said(model, batch)
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)
    for a, b in zip(got[1], want[1], strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5, rtol=1e-4))
    read = {id(m): shape[-2] for m, shape in heard}
    assert read.pop(id(found[1])) < len(batch.ids) and all(n >= len(batch.ids) for n in read.values())


def test_whoever_listens_hears_everything():
    model, batch, heard = zoo.make("llama"), zoo.rows(), set()
    up = last_mlp(model)[1].up_proj
    hook = up.register_forward_pre_hook(lambda module, given: heard.add(given[0].shape[1]))
    CAUSAL.forward(model, Untuned(model), batch)
    hook.remove()
    assert heard == {len(batch.ids)} and not last_mlp(model)[1]._forward_hooks
