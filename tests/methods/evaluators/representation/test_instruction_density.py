"""instruction_density: attribution of a linear model, density by hand, and a model beside itself."""

from __future__ import annotations

import json

import pytest
import torch

from luthier.methods.evaluators.representation.instruction_density import (
    InstructionDensity,
    attribution,
    density,
    part_of_prompt,
    whole_levels,
)

ROWS = [
    {"id": str(i), "prompt": f"say it twice: {w}", "completions": [w * 2], "instruction": "say it twice"}
    for i, w in enumerate(["ab", "xyz"])
]


def test_attribution_of_a_linear_model():
    rng = torch.Generator().manual_seed(0)
    weights, x = (torch.randn(5, 3, generator=rng) for _ in range(2))
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad((weights * x).sum(), x)
    assert torch.equal(attribution(gradient, x), (weights * x.detach()).sum(-1).abs())


def test_what_all_outputs_use_is_denser():
    scores = torch.tensor([[2.0, 2.0, 2.0, 2.0], [9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    values = density(scores)
    assert values.tolist() == [pytest.approx(8 / (4 * 2.0**4) ** 0.25), pytest.approx(1.0), 0.0]
    assert density(5 * scores)[:2].tolist() == pytest.approx(values[:2].tolist())
    assert whole_levels(torch.tensor([[1.0, 0.2], [0.52, 0.01]]), 10).tolist() == [[10.0, 10.0], [5.0, 0.0]]
    assert whole_levels(torch.zeros(2, 2), 10).sum() == 0


def test_a_model_beside_itself(roles, tmp_path):
    evaluator = InstructionDensity(outputs=3)
    before, after = (evaluator.run(roles, ROWS, tmp_path, when) for when in ("before", "after"))
    assert before == after  # nothing changed
    assert before["density_gap"] == pytest.approx(before["instruction_density"] - before["context_density"])
    by_row = json.loads((tmp_path / "per_example-after.json").read_text())
    assert by_row["density_gap"].keys() == {"0", "1"} and 1 <= before["instruction_density"] <= 3
    assert evaluator.run(roles, [{**ROWS[0], "instruction": "not there"}], tmp_path, "after") == {}


def test_importance_is_the_derivative(roles):
    """Along one embedding it is what a small change of its length does to the probability."""
    from luthier.methods.evaluators.representation.instruction_density import importance

    scores, ids = importance(roles, ROWS[0], 2)
    assert scores.shape == (len(ids), 2)
    assert roles.text(ids) == ROWS[0]["prompt"]
    place, step = 4, 1e-3
    probabilities = []
    for factor in (1 + step, 1 - step):

        def hook(module, args, y, factor=factor):
            y = y.clone()
            y.view(-1, y.shape[-1])[place] *= factor
            return y

        handle = roles.policy.model.get_input_embeddings().register_forward_hook(hook)
        with torch.no_grad():
            probabilities.append(float(roles.policy.logprobs(roles.batch([ROWS[0]]))[0].double().exp()))
        handle.remove()
    slope = abs(probabilities[0] - probabilities[1]) / (2 * step)
    assert float(scores[place, 0]) == pytest.approx(slope, rel=0.05)


def test_which_tokens_are_the_instruction(roles):
    ids = roles.renderer.tokenizer.encode("do: x")
    assert part_of_prompt(roles, ids, "do") == [True, True, False, False, False]
