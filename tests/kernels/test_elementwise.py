"""Norms and rotary positions in fewer passes: against their plain twins, and in networks that take them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from helpers import zoo
from helpers.models import make_llama
from luthier import compat
from luthier.compat.malloc import keep_memory
from luthier.errors import RecipeError
from luthier.kernels import _switch
from luthier.kernels import elementwise as fast

KINDS = {  # name -> fast, plain, shapes of what moves, what does not
    "norm": (fast.rms_norm, fast.plain_norm, [(2, 7, 12), (12,)], [1e-6]),
    "rotary": (fast.rotary, fast.plain_rotary, [(1, 2, 7, 8)], ["cos", "sin"]),
}


@pytest.fixture(autouse=True)
def session():
    """As within a run: other libraries' functions may be replaced."""
    with compat.session():
        yield


def given(kind, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    _, _, shapes, rest = KINDS[kind]
    fixed = [torch.randn(1, 1, 7, 8, generator=g).to(dtype) if isinstance(r, str) else r for r in rest]
    return [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes], fixed


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stretch", [20, 2**19])
def test_each_is_its_plain_twin(kind, dtype, atol, stretch, monkeypatch):
    """Values and gradients of all that moves, in stretches and whole; bf16 within the rounding of numbers
    around 4.
    """
    monkeypatch.setattr(fast, "STRETCH", stretch)
    quick, plain, *_ = KINDS[kind]
    found = []
    for f in (quick, plain):
        moving, fixed = given(kind, dtype)
        out = f(*moving, *fixed)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found.append([out, *torch.autograd.grad(out, moving, weight)])
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype == dtype and got.shape == want.shape
        torch.testing.assert_close(got, want, atol=atol, rtol=atol)


def test_a_frozen_weight_gets_no_gradient_and_a_norm_keeps_one_number_a_row():
    (x, weight), (eps,) = given("norm")
    out = fast.rms_norm(x, weight.detach(), eps)
    kept = [t for t in out.grad_fn.saved_tensors if t.shape not in (x.shape, weight.shape)]
    assert [t.shape for t in kept] == [(14, 1)]
    out.sum().backward()
    assert weight.grad is None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    quick, plain, *_ = KINDS[kind]
    found = []
    for f in (quick, plain):
        moving, fixed = given(kind)
        grads = torch.autograd.grad(f(*moving, *fixed).sin().sum(), moving, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), moving))
    for got, want in zip(*found, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_network_takes_them_and_answers_alike():
    """Hidden states and gradients of the input; a copy of the network has modules of its own; the way back
    leaves no trace.
    """
    model = make_llama().requires_grad_(False)
    # rotary positions belong to the modelling file: a run before this one may have left it the fast form
    fast.uninstall(model)
    kinds = [type(m) for m in model.modules()]
    was = sys.modules[kinds[0].__module__].apply_rotary_pos_emb
    embed = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))

    def said(network):
        x = embed.clone().requires_grad_()
        out = network.model(inputs_embeds=x, use_cache=False).last_hidden_state
        out.sin().sum().backward()
        return out.detach(), x.grad

    want = said(model)
    try:
        assert fast.install(model) == {"LlamaRMSNorm": 9, fast.ROTARY: 1} and fast.install(model) == {}
        assert fast.is_installed(model)
        twin = copy.deepcopy(model)
        nn.init.zeros_(twin.model.norm.weight)
        calls = []
        with (
            _switch.always(),
            torch.autograd.graph.saved_tensors_hooks(lambda t: calls.append(t) or t, lambda t: t),
        ):
            got = said(model)
            assert not said(twin)[0].any()
        few, calls[:] = len(calls), []
        with (
            _switch.plainly(),
            torch.autograd.graph.saved_tensors_hooks(lambda t: calls.append(t) or t, lambda t: t),
        ):
            said(model), said(model)
        assert few < len(calls)  # what is kept for backward is less: the fast forms were what ran
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    finally:
        fast.uninstall(model)
    assert [type(m) for m in model.modules()] == kinds and sys.modules[
        kinds[0].__module__
    ].apply_rotary_pos_emb is was
    assert not fast.is_installed(model)


def test_gelu_of_eight_operations_is_one():
    """GPT-2's: values and gradients; the way back leaves no trace."""
    model = zoo.make("gpt2")
    own = {type(m) for m in model.modules()}
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    act = next(m for m in model.modules() if type(m).__name__ == fast.GELU)
    want = act(x)
    try:
        assert fast.install(model)[fast.GELU] == 2
        with _switch.always():
            got = act(x)
        # small tensors: as they were
        assert got.grad_fn.name() == "GeluBackward0" and act(x).grad_fn.name() != "GeluBackward0"
        for a, b in zip(
            (got, *torch.autograd.grad(got.sum(), x)),
            (want, *torch.autograd.grad(want.sum(), x)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    finally:
        fast.uninstall(model)
    assert {type(m) for m in model.modules()} == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_leaves_out_its_share_and_keeps_the_mean(dtype):
    """Gradients go where numbers stayed; the seed decides; where nothing is trained, nothing is left out."""
    model = nn.Sequential(nn.Dropout(0.1))
    fast.install_dropout(model)
    assert isinstance(model[0], nn.Dropout) and not fast.is_installed(model)
    x = torch.ones(2**18, dtype=dtype).view(2, -1).requires_grad_()
    torch.manual_seed(0)
    out = model(x)
    kept = out != 0
    assert abs(float(kept.float().mean()) - 0.9) < 3e-3 and out.dtype == dtype
    assert torch.allclose(out[kept].float(), torch.tensor(1 / 0.9), rtol=2**-8)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad != 0, kept)
    torch.manual_seed(0)
    assert torch.equal(model(x), out) and not torch.equal(model(x), out)
    both = kept.view(-1, 4).float()
    assert (torch.corrcoef(both.T) - torch.eye(4)).abs().max() < 0.03  # four come from one draw
    assert torch.equal(model.eval()(x), x)
    fast.uninstall(model)
    assert type(model[0]) is nn.Dropout


def test_what_answers_otherwise_is_left_alone():
    """A norm by another name of its weight's meaning (Gemma multiplies by 1 + w)."""

    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(12)), 1e-6

        def forward(self, x):
            return fast.plain_norm(x, 1 + self.weight, self.eps)

    model = nn.Sequential(OddRMSNorm())
    assert fast.install(model) == {} and type(model[0]) is OddRMSNorm


def test_a_kernel_that_is_wrong_is_found_and_told(tiny, monkeypatch):
    """Right when it is tried on random numbers and wrong later: the first batch finds it, and the run goes on
    without.
    """
    from helpers.rows import SUMS
    from luthier.model.load import assemble
    from luthier.recipe.recipe import Recipe
    from luthier.recipe.validate import build_methods
    from luthier.train import checks as guards

    recipe = Recipe.load({"model": tiny, "data": SUMS, "dtype": "float32"})
    roles = assemble(recipe, build_methods(recipe), {})
    rows = roles.batch([{"id": "0", "prompt": "1+1=", "completions": ["2"], "scores": [1.0]}])
    told: list[str] = []
    passes: list[int] = []
    hook = roles.policy.model.model.register_forward_hook(lambda *_: passes.append(1))
    roles.policy.logprobs(rows.view())  # the head is known from here on
    passes.clear()
    guards.check_forward(roles.policy, rows, told.append)
    hook.remove()
    assert not told and fast.is_installed(roles.policy.model)
    assert len(passes) == 3, "its own forward, that with the kernels in it, and the layout: each once"
    monkeypatch.setattr(fast, "rms_norm", lambda x, w, eps: 2 * fast.plain_norm(x, w, eps))
    guards.check_forward(roles.policy, rows, told.append)
    assert (
        len(told) == 1
        and "differ from the model's own" in told[0]
        and not fast.is_installed(roles.policy.model)
    )


def test_liger_is_refused_in_a_sentence_where_it_cannot_run(tiny, monkeypatch):
    from luthier.kernels import liger
    from luthier.model.load import load_model
    from luthier.recipe.recipe import Recipe
    from luthier.recipe.validate import build_methods

    recipe = Recipe.load({"model": tiny, "architecture": {"name": "causal", "fused": "liger"}})
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="a CUDA device, but the model is on cpu"):
            load_model(recipe, build_methods(recipe), {})
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'luthier\[liger\]'"):
        liger.forms(torch.device("cuda"))


def test_liger_is_taken_only_where_it_agrees():
    """With its functions stood in for by right and wrong ones, called as liger's are."""
    from types import SimpleNamespace

    from luthier.kernels import liger

    def norm(right):
        def apply(x, weight, eps, offset, casting_mode, in_place):
            assert (offset, casting_mode, in_place) == (0.0, "llama", False)
            return fast.plain_norm(x, weight + (not right), eps)

        return SimpleNamespace(LigerRMSNormFunction=SimpleNamespace(apply=apply))

    def rope(q, k, cos, sin, position_ids, unsqueeze_dim):
        assert position_ids is None and unsqueeze_dim == 1
        return tuple(fast.plain_rotary(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in (q, k))

    turns = SimpleNamespace(LigerRopeFunction=SimpleNamespace(apply=rope))
    for right, want in ((True, {"LlamaRMSNorm": 9, fast.ROTARY: 1}), (False, {fast.ROTARY: 1})):
        model = make_llama()
        fast.uninstall(model)
        try:
            assert fast.install(model, liger.bound(norm(right), turns)) == want
        finally:
            fast.uninstall(model)


def test_memory_is_kept_unless_somebody_said_how(monkeypatch):
    """In a process of its own: what it says is for good."""
    code = (
        "from luthier import compat; compat.keep(); from luthier.compat.malloc import keep_memory;"
        " print(keep_memory())"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **more}
        ).stdout
        for more in ({}, {"MALLOC_ARENA_MAX": "2"})
    ]
    assert said[1].strip() == "False"
    if sys.platform == "linux":
        assert said[0].strip() == "True"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert keep_memory() is False


def test_threads_choose_for_themselves():
    """A run that begins in one thread changes no number of a run in another, nor anything afterwards."""
    x, ready, go = torch.ones(4), threading.Barrier(2, timeout=10), threading.Event()
    while_open, left = [], []

    def first():
        with _switch.always():
            ready.wait()
            while_open.append(fast.use_fast(x))
            go.wait(10)
        left.append(fast.use_fast(x))

    thread = threading.Thread(target=first)
    thread.start()
    ready.wait()
    assert not fast.use_fast(x)
    with _switch.always():  # opened within the other's, closed after it
        go.set()
        thread.join()
    assert while_open == [True] and left == [False]
    assert not fast.use_fast(x)
