"""neftune: neftunes noise is bounded and only in training; at the top of a recipe."""

from __future__ import annotations

import math

import torch

from helpers.objectives import batch_of, cast, make_rows
from luthier.methods.architectures.text.causal import Causal
from luthier.recipe.recipe import Recipe


def test_neftunes_noise_is_bounded_and_only_in_training():
    roles, rows = cast(reference=None), make_rows(3, k=2)
    made, batch = Causal(neftune_noise_alpha=5.0), batch_of(rows)
    torch.manual_seed(0)
    noise = made.noise(batch, 16)
    for s, places in enumerate(batch.segments()):
        row = batch.rows[int(batch.segment[places][0]) // 3]
        longest = max(map(len, row["completions"])) if s % 3 == 0 else len(row["completions"][s % 3 - 1])
        bound = 5.0 / math.sqrt((len(row["prompt"]) + longest) * 16)
        assert 0.5 * bound < float(noise[places].abs().max()) <= bound
    plain = roles.policy.logprobs(batch_of(rows)).detach()
    roles.policy.architecture = made
    torch.testing.assert_close(roles.policy.logprobs(batch_of(rows)).detach(), plain)
    roles.policy.train()
    noisy = []
    for layout in (made, Causal(neftune_noise_alpha=5.0, packing=False, share_prompts=False)):
        torch.manual_seed(7)
        roles.policy.architecture = layout
        noisy.append(roles.policy.logprobs(batch_of(rows)).detach())
    assert not torch.allclose(noisy[0], plain, atol=1e-3)
    torch.testing.assert_close(*noisy, atol=1e-5, rtol=1e-5)


def test_neftune_at_the_top_of_a_recipe():
    recipe = Recipe.load({"neftune_noise_alpha": 5, "data": []})
    assert recipe.methods()["architecture"].neftune_noise_alpha == 5
