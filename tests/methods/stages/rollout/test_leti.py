"""leti: the format of rows, exceptions in the feedback, and what the reward tokens come to mean."""

from __future__ import annotations

import pytest
import torch

from helpers.rounds import scripted
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.sandbox.sandbox import kernel_walls

ROWS = [{"id": "r", "prompt": "Add one.\n", "tests": ["assert f(1) == 2", "assert f(5) == 6"]}]
PROGRAMS = [
    "def f(x): return x + 1",
    "def f(x): return x + y",
    "def f(x): return 2",
    "def f(x) return",
    "while True: pass",
]
pytestmark = pytest.mark.skipif(not kernel_walls(), reason="no sandbox here")


@pytest.fixture(scope="module")
def written():
    roles = scripted(lambda prompt, seed: PROGRAMS[seed % 5])
    rows = build("stage", {"name": "leti", "n": 5, "timeout": 1.0})(ROWS, roles)
    return roles, {row["completions"][0].split("<|lang_feedback|>")[0]: row for row in rows}


@pytest.mark.long
def test_rows_have_the_format(written):
    roles, rows = written
    assert set(rows) == set(PROGRAMS) and roles.policy.prompts == ["<|good|>Add one.\n"]
    right = rows.pop(PROGRAMS[0])
    assert right["prompt"] == "<|good|>Add one.\n" and right["completions"] == [PROGRAMS[0]]
    assert right["scores"] == [1.0] and roles.stage_metrics["right"] == 0.2
    for program, row in rows.items():
        assert row["prompt"] == "<|bad|>Add one.\n" and row["scores"] == [0.0]
        (text,) = row["completions"]
        assert text.startswith(f"{program}<|lang_feedback|>") and text.endswith("<|/lang_feedback|>")


def test_feedback_names_the_exception(written):
    _, rows = written
    for program, name in zip(
        PROGRAMS[1:], ("NameError", "AssertionError", "SyntaxError", "timeout"), strict=True
    ):
        assert name in rows[program]["completions"][0]
    assert "line 1, in f" in rows[PROGRAMS[1]]["completions"][0]  # the trace
    stage = build("stage", {"name": "leti", "textual": False})
    bare = stage.row(ROWS[0], 0, PROGRAMS[1], "NameError")
    assert bare["prompt"].startswith("<|bad|>") and bare["completions"] == [PROGRAMS[1]]


@pytest.mark.long
def test_programs_behind_the_good_token_are_right_more_often():
    """A policy with a logit for each program behind each token, fitted to the rows of its own programs."""
    programs = [f"def f(x): return x + {k}" for k in range(4)]
    weight = torch.zeros(2, 4, requires_grad=True)

    def reply(prompt, seed):
        likely = weight[int(prompt.startswith("<|good|>"))].detach().softmax(-1)
        return programs[int(torch.multinomial(likely, 1, generator=torch.Generator().manual_seed(seed)))]

    rows = build("stage", {"name": "leti", "n": 16})(ROWS, scripted(reply))
    adam = torch.optim.Adam([weight], lr=0.3)
    for _ in range(40):
        adam.zero_grad()
        losses = []
        for row in rows:
            token = int(row["prompt"].startswith("<|good|>"))
            place = programs.index(row["completions"][0].split("<|lang")[0])
            losses.append(-weight[token].log_softmax(-1)[place])
        torch.stack(losses).mean().backward()
        adam.step()
    right = weight.detach().softmax(-1)[:, 1]
    assert right[1] > 0.8 and right[0] < 0.1


def test_rounds_write_with_the_policy_as_it_is():
    plan = build("plan", {"name": "leti", "rounds": 2, "n": 4, "textual": False})
    (stage,) = plan.sample(1)
    assert stage["name"] == "leti" and stage["draw"] == 1 and stage["textual"] is False
    play = plan.recipes(Recipe.load({"model": "toy:lm"}))
    first = next(play)
    assert [s["name"] for s in first.stages] == ["leti", "provenance"] and first.objective == "sft"
    with pytest.raises((RecipeError, ValueError)):
        build("stage", {"name": "leti", "n": 0})
