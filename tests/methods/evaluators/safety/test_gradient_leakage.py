"""gradient_leakage: tokens are read off a planted gradient, and none off noise or zeros."""

from __future__ import annotations

import pytest
import torch

from helpers.rows import SUMS
from luthier.data.load import load_rows
from luthier.methods.evaluators.safety.gradient_leakage import GradientLeakage, first_matrix, inside
from luthier.model.load import assemble
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import validate

ROWS = [
    {"id": str(i), "prompt": f"{word} ", "completions": [word[::-1]]}
    for i, word in enumerate(["abcd", "xyz", "hello", "word", "quick", "fox"])
]


@pytest.fixture(scope="module")
def low_rank(shallow):
    """Roles of a network with LoRA of rank 16, B drawn as after some steps."""
    recipe = Recipe.load({"model": shallow, "tuner": {"name": "lora", "r": 16}, "dtype": "float32"})
    roles = assemble(recipe, validate(recipe, load_rows(SUMS).rows))
    return roles


def draw(roles, scale: float) -> None:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in roles.policy.model.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=rng))


def test_a_low_rank_gradient_gives_tokens_away(low_rank, tmp_path):
    draw(low_rank, 0.05)
    metrics = GradientLeakage().run(low_rank, ROWS, tmp_path, "after")
    assert metrics["leaked_tokens"] == 1.0 and metrics["leak_precision"] > 0.95


def test_noise_and_zero_gradients_give_nothing(low_rank, tmp_path):
    draw(low_rank, 0.05)
    noisy = GradientLeakage(noise=1.0).run(low_rank, ROWS, tmp_path, "after")
    assert noisy["leaked_tokens"] < 0.1
    draw(low_rank, 0.0)  # as LoRA begins: the gradient of A is zero
    assert GradientLeakage().run(low_rank, ROWS, tmp_path, "before") == {"leaked_tokens": 0.0}
    assert len(inside(torch.zeros(4, 8), torch.randn(20, 8), 1e-3)) == 0


def test_planted_and_absent_inputs():
    """Of 50 gradients each gives exactly its own inputs, whatever these are."""
    for seed in range(50):
        rng = torch.Generator().manual_seed(seed)
        inputs = torch.randn(100, 24, generator=rng)
        some = torch.randperm(100, generator=rng)[:6]
        gradient = torch.randn(16, 6, generator=rng) @ inputs[some]
        assert set(inside(gradient, inputs, 1e-3).tolist()) == set(some.tolist())


def test_full_tuning_and_larger_groups(roles, tmp_path):
    """A matrix that is trained itself leaks as well; of many rows together less is told apart."""
    module, parameter = first_matrix(roles.policy.model)
    assert module is roles.policy.model.model.layers[0].self_attn.v_proj and parameter is module.weight
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    rows = []
    for k in range(0, 48, 6):
        rows.append({"id": str(k), "prompt": letters[k : k + 3], "completions": [letters[k + 3 : k + 6]]})
    alone = GradientLeakage().run(roles, rows, tmp_path, "before")
    together = GradientLeakage(together=8).run(roles, rows, tmp_path, "before")  # more tokens than its rank
    assert alone["leaked_tokens"] == 1.0 and alone["leak_precision"] > 0.95
    assert together["leaked_tokens"] < 0.1
