"""paraphrase_targets: the target is the own wording's distribution; a soft prompt draws
other wordings to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.objectives import cast, role, small_llama
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.model.policy import Policy, Roles
from luthier.registry import build

OPTIONS = [" w20", " w21"]  # words with a 3 first are no single tokens here


def row(item: int) -> dict:
    """What is answered depends on the item alone."""
    right = item % 2
    return {"id": f"{item}", "prompt": f"w{item}", "completions": [OPTIONS[right]]}


def with_teacher(roles: Roles) -> Roles:
    roles.players["teacher"] = role(roles.policy.model, "teacher")
    roles.warn = lambda sentence: None
    return roles


@torch.no_grad()
def test_the_target_is_the_own_wordings_distribution():
    roles = with_teacher(small_llama())
    stage = build(
        "stage", {"name": "paraphrase_targets", "k": 5, "templates": ["w4 {prompt}", "{prompt} w5"]}
    )
    own = row(6)
    out = stage([{**own, "paraphrases": ["w7 w8"]}], roles)
    assert [r["prompt"] for r in out] == ["w4 w6", "w6 w5", "w7 w8"]
    assert len({r["id"] for r in out}) == 3 and not any("paraphrases" in r for r in out)
    logprobs, ids = roles.teacher.outputs(roles.batch([own])).top(5)
    for worded in out:
        assert worded["teacher_ids"] == [ids.tolist()]
        assert torch.allclose(torch.tensor(worded["teacher_logprobs"][0]), logprobs, atol=1e-2)
    with pytest.raises(RecipeError, match="needs {prompt}"):
        build("stage", {"name": "paraphrase_targets", "templates": ["w4"]})


@torch.no_grad()
def test_an_equal_wording_costs_nothing():
    roles = with_teacher(small_llama())
    first = build("objective", "first")
    for templates, same in ((["{prompt}"], True), (["w4 {prompt}"], False)):
        stage = build("stage", {"name": "paraphrase_targets", "k": 40, "templates": templates})
        cost = first.loss(roles, roles.batch(stage([row(6), row(7)], roles)))
        assert (float(cost.abs().max()) < 1e-4) == same


def test_a_prompt_draws_other_wordings_to_the_own_one():
    roles = with_teacher(cast())
    net = roles.policy.model
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    templates = [f"w{k} {{prompt}}" for k in (22, 23, 24, 25)]
    stage = build("stage", {"name": "paraphrase_targets", "templates": templates})
    rows = stage([row(item) for item in range(6, 14)], roles)
    torch.manual_seed(0)
    prompt: Any = build("tuner", {"name": "prompt", "num_virtual_tokens": 4}).attach(net)
    tuned = Roles(Policy(Causal(), net, prompt), roles.clock, roles.renderer)
    first, batch = build("objective", "first"), tuned.batch(rows)
    adam = torch.optim.Adam([prompt.prompt], lr=0.1)
    costs = []
    for _ in range(25):
        adam.zero_grad()
        cost = first.loss(tuned, batch.view()).mean()
        cost.backward()
        adam.step()
        costs.append(float(cost.detach()))
    assert costs[-1] < 0.7 * costs[0], costs
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
