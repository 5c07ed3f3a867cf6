"""Attention by calls of flash attention, on the pretended device: what a mask over the whole row gives."""

from types import SimpleNamespace

import pytest
import torch

from helpers.pretended_cuda import CUDA, pretended_cuda
from luthier.kernels import attention, flash
from luthier.kernels.attention_plan import plan
from luthier.model.batch import collate
from luthier.model.layout import lay_out

SHAPES = {  # tokens of each row's prompt and completions
    "one causal sequence each": [(7, [9]), (3, [5]), (0, [4])],
    "shared prompts": [(12, [9]), (3, [4, 5, 7, 2]), (1, [1]), (2, [6, 6])],
}


def laid_out(shape, device, **how):
    rows = []
    for i, (prompt, sizes) in enumerate(SHAPES[shape]):
        encoded = SimpleNamespace(
            prompt=[5] * prompt, completions=[[6] * n for n in sizes], supervised=[[True] * n for n in sizes]
        )
        rows.append({"id": str(i), "encoded": encoded})
    batch = collate(rows, lambda row: row["encoded"])
    return lay_out(batch.to(device), **how)


CASES = {
    "packed": (dict(width=10**6), None, 0),
    "rows": (dict(width=0), None, 0),
    "window": (dict(width=10**6, share=False), 4, 0),
    "both sides": (dict(width=10**6, prefix=True), None, 0),
    "soft": (dict(width=10**6, virtual=3), None, 0),
    "ahead": (dict(width=10**6), None, 5),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_calls_answer_as_a_mask_does(case, shape):
    how, window, ahead = CASES[case]
    rng = torch.Generator().manual_seed(1)
    with pretended_cuda() as counts:
        layout = laid_out(shape, CUDA, **how)
        (rows, width), plans = layout.source.shape, plan(layout, torch.bfloat16, window)
        assert plans.calls is not None
        inputs = []
        for heads in (4, 2, 2):
            inputs.append(torch.randn(rows, heads, width, 8, generator=rng).bfloat16())
        for _ in range(2 if ahead else 0):
            inputs.append(torch.randn(2, ahead, 8, generator=rng).bfloat16())
        weight = torch.randn(rows, width, 4, 8, generator=rng)
        weight = weight.to(CUDA) * (layout.piece >= 0)[:, :, None, None]
        here = [x.to(CUDA).requires_grad_() for x in inputs]
        assert flash.works(here[0].device, torch.bfloat16, 8, 2)
        counts.clear()
        out = attention.attend(*here[:3], plans, 0.3, 0.0, tuple(here[3:]) or None)
        assert counts.operations["_flash_attention_forward"] == len(plans.calls.calls) + bool(ahead)
        grads = torch.autograd.grad((out.float() * weight).sum(), here)
        wide = [x.detach().float().requires_grad_() for x in here]
        expected = attention.plain(*wide[:3], plans, 0.3, tuple(wide[3:]) or None)
        expected_grads = torch.autograd.grad((expected * weight).sum(), wide)
        real = (layout.piece >= 0)[:, :, None, None]
        for answer, right in zip((out * real, *grads), (expected, *expected_grads), strict=True):
            assert float((answer.float() - right).norm() / right.norm()) < 0.01


def test_what_shares_nothing_is_one_call_and_each_depth_one_more():
    assert len(flash.calls_of(laid_out("one causal sequence each", "cpu", width=10**6)).calls) == 1
    assert len(flash.calls_of(laid_out("shared prompts", "cpu", width=10**6)).calls) == 2
    assert flash.calls_of(laid_out("shared prompts", "cpu", width=10**6), window=3) is None
    assert flash.calls_of(laid_out("shared prompts", "cpu", width=10**6), chunk=4) is None


def test_where_the_operation_is_wrong_attention_stays_in_blocks(monkeypatch):
    with pretended_cuda() as counts:
        layout = laid_out("shared prompts", CUDA, width=10**6)
        x = torch.randn(1, 2, layout.source.shape[1], 8).bfloat16().to(CUDA)
        monkeypatch.setattr(flash, "works", lambda *how: False)
        attention.attend(x, x, x, plan(layout, torch.bfloat16), 0.3)
        assert not counts.operations["_flash_attention_forward"] and counts.operations["bmm"]
        monkeypatch.undo()
        attention.attend(x.float(), x.float(), x.float(), plan(layout, torch.float32), 0.3)
        assert not counts.operations["_flash_attention_forward"]


def test_a_gradient_of_a_gradient_is_that_of_the_plain_form():
    with pretended_cuda():
        layout = laid_out("shared prompts", CUDA, width=10**6)
        plans = plan(layout, torch.bfloat16)
        x = torch.randn(1, 2, layout.source.shape[1], 8, generator=torch.Generator().manual_seed(2))
        twice = []
        for way in (attention.attend, attention.plain):
            q = x.bfloat16().to(CUDA).requires_grad_()
            loss = way(q, q, q, plans, 0.3).float().square().sum()
            (grad,) = torch.autograd.grad(loss, q, create_graph=True)
            twice.append(torch.autograd.grad(grad.float().square().sum(), q)[0].float())
        assert float((twice[0] - twice[1]).norm() / twice[1].norm()) < 0.05
