"""Polyhistor: Kronecker products of a task's template, their numbers, and tasks on four stages."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import SwinConfig, SwinModel

from helpers.tuners import base, logprobs, put
from luthier.errors import RecipeError
from luthier.methods.tuners._base import Untuned

TASKS = ["a", "b", "c"]


@lru_cache
def swin() -> Any:
    """Four stages of widths 8, 16, 32 and 64."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    config = SwinConfig(image_size=32, patch_size=2, window_size=2, initializer_range=0.2, **sizes)
    return SwinModel(config).eval()


def tuned(**settings: Any) -> Any:
    how = {"tasks": TASKS, "embedding": 4, "rank": 2, "reduction_factor": 2, **settings}
    return put("polyhistor", swin().__class__(swin().config).eval(), **how)


def fill(attached: Any, std: float = 0.5) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in attached.parameters().values():
            p.normal_(std=std, generator=generator)
    return attached


@torch.no_grad()
def test_an_adapter_is_a_kernel_times_the_tasks_template():
    attached = fill(tuned())
    widths = set()
    for layer in attached.layers.values():
        p, x = layer.tensors("default"), torch.randn(2, 3, layer.base_layer.in_features)
        width = layer.base_layer.out_features
        widths.add(width)
        attached.set_route(torch.tensor([2, -1]))
        left, right = (torch.einsum("e,eab->ab", p.task[2], m) for m in (p.down_I, p.down_J))
        down, up = attached.settings.adapter(p, 2)
        assert torch.allclose(down, torch.kron(p.down_kernel, left @ right), atol=1e-6)
        assert down.shape == (width // 2, width) and up.shape == (width, width // 2)
        y = layer.base_layer(x)
        want = y[0] + torch.relu(y[0] @ down.T) @ up.T
        assert torch.allclose(layer(x)[0], want, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer(x)[1], y[1])  # a row of no task is read by the base
    assert widths == {8, 16, 32, 64}
    first = next(iter(attached.layers.values())).tensors("default")
    assert all(layer.tensors("default").task is first.task for layer in attached.layers.values())
    text = put("polyhistor", None, tasks=None)
    assert torch.equal(logprobs(text), logprobs(Untuned(base())))
    assert not torch.allclose(logprobs(fill(text)), logprobs(Untuned(base())), atol=1e-2)


def test_numbers_are_the_formula_and_fewer_than_adapters():
    attached = tuned()
    widths = [layer.base_layer.out_features for layer in attached.layers.values()]
    assert len(widths) == 8
    own = sum(p.numel() for p in attached.parameters().values())
    # 3 embeddings of 4; two templates of rank 2, 4 by 8; two kernels for each layer
    assert own == attached.settings.numbers(widths) == 4 * (3 + 2 * 2 * 12) + 2 * 2 * (1 + 4 + 16 + 64)
    pfeiffer = put("pfeiffer", swin().__class__(swin().config), reduction_factor=2)
    assert own < 3 * sum(p.numel() for p in pfeiffer.parameters().values())
    with pytest.raises(RecipeError, match="different names"):
        put("polyhistor", None, tasks=["a", "a"])


def test_two_tasks_on_four_stages_beat_linear_heads():
    """Against the best linear heads there are (least squares) on what the frozen network says."""
    attached = tuned(tasks=["a", "b"])
    images = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    means = images.mean((2, 3)) * 32
    targets = torch.stack([means[:, 0] * means[:, 1], means[:, 2] ** 2])

    def features(task: int) -> torch.Tensor:
        attached.set_route(torch.full((48,), task))
        pooled = attached.model(images).pooler_output[:, :8]
        return torch.cat([pooled, torch.ones(48, 1)], 1)

    def rest(states: torch.Tensor, target: torch.Tensor) -> float:
        solution = torch.linalg.lstsq(states, target[:, None]).solution
        return float(F.mse_loss(states @ solution, target[:, None]))

    with torch.no_grad():
        before = [rest(features(task), targets[task]) for task in (0, 1)]
    heads = torch.zeros(2, 9, requires_grad=True)
    adam = torch.optim.Adam([heads, *attached.parameters().values()], lr=0.03)
    for _ in range(12):
        adam.zero_grad()
        for task in (0, 1):
            F.mse_loss(features(task) @ heads[task], targets[task]).backward()
        adam.step()
    with torch.no_grad():
        after = [rest(features(task), targets[task]) for task in (0, 1)]
    assert all(late < 0.8 * early for early, late in zip(before, after, strict=True)), (before, after)
