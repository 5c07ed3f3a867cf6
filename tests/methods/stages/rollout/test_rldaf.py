"""rldaf: feedback follows the controller, and a model tuned with it writes more fluently under it."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.stages import make_roles
from helpers.styles import PROMPT, has_attribute, preference_rows, style_model
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.decoders.arithmetic._joined import companion
from luthier.methods.stages._base import completion_logprobs
from luthier.registry import build

STRENGTH = 1.0  # with which the controller alone breaks the words


def controller() -> dict:
    return {"name": "prompt_controller", "data": preference_rows(), "strength": STRENGTH}


def test_feedback_grows_with_the_intervention():
    stage = build("stage", {"name": "rldaf", "feedback": 0.5})
    weights = stage.weights([0.0, 1.0, 5.0])
    assert weights == pytest.approx([0.5, 0.75, 1.75]) and sum(weights) == pytest.approx(3)
    assert stage.weights([0.0, 0.0]) == [1.0, 1.0]
    row = stage.scored({"id": "x"}, [1.0, 0.0], [-1.0, -2.0], [[1.0, 3.0], [2.0]])
    assert row["scores"] == pytest.approx([0.8, -0.4])
    assert row["token_advantages"][0] == pytest.approx([1.2 * 0.75, 1.2 * 1.25])
    assert row["token_advantages"][1] == pytest.approx([-1.2])
    assert row["rewards"]["intervention"] == [2.0, 2.0]


def test_another_decoder_is_refused():
    with pytest.raises(RecipeError, match="no controller"):
        build("stage", {"name": "rldaf", "controller": "best_of_n"})


@pytest.mark.slow
def test_tuned_with_the_controller_texts_are_more_fluent(tmp_path):
    """Biases and norms alone move, a 250th of the parameters; perplexity is the untuned model's."""
    roles = make_roles(style_model(tmp_path), {"name": "bitfit", "also": ["norms"]})
    roles.reference = companion(roles.policy, "base")
    own = dict(roles.policy.model.named_parameters())
    before = {name: p.detach().clone() for name, p in own.items()}
    trained = roles.tuner.parameters()
    assert sum(p.numel() for p in trained.values()) < 0.05 * sum(p.numel() for p in own.values())
    accuracy, perplexity = quality(roles)
    settings = {"n": 16, "max_new_tokens": 20, "fluency": 0.3}
    stage = build("stage", {"name": "rldaf", "controller": controller(), **settings})
    objective = build("objective", "reinforce_pp")
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.0)
    for step in range(40):
        roles.clock = Clock(0, step)
        batch = roles.batch(stage([{"id": "r", "prompt": PROMPT}], roles))
        loss = objective.loss(roles, batch).sum() / objective.divisor(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tuned_accuracy, tuned_perplexity = quality(roles)
    assert accuracy > 0.9 and tuned_accuracy >= accuracy - 0.03
    assert tuned_perplexity < 0.6 * perplexity
    for name, p in own.items():
        assert p.requires_grad or torch.equal(p, before[name]), name


def quality(roles) -> tuple[float, float]:
    """(share of 48 texts under control that have the attribute, their perplexity for the untuned model)."""
    decoder = build("decoder", controller())
    prompt = roles.renderer.prompt({"id": "x", "prompt": PROMPT})
    how = {"seeds": [5], "n": 48, "max_new_tokens": 20, "stop": [1], "temperature": 1.0}
    (answers,) = decoder.generate(roles, [{}], [prompt], **how)
    row = {"id": "x", "prompt": PROMPT, "completions": answers}
    (logprobs,) = completion_logprobs(roles.reference, roles, [row], 1)
    flat = [x for text in logprobs for x in text]
    share = sum(has_attribute(roles, ids) for ids in answers) / len(answers)
    return share, math.exp(-sum(flat) / len(flat))
