"""codeclm: metadata, gaps in both orders, rewriting until the gap is wide, the limit of iterations."""

from __future__ import annotations

import re

import pytest

from helpers.synthesis import Scripted, nobody
from luthier.methods.stages.synthesize._synthesis import Author, PolicySpeaker
from luthier.registry import build

SEEDS = [{"id": "a", "prompt": "write a poem"}, {"id": "b", "prompt": "plan a trip"}]
SCORES = {"strong": 9, "weak": 2, "alike": 8}


def script(prompt: str, seed: int) -> str:
    if prompt.startswith("Which use case"):
        name = "poetry" if "poem" in prompt else "travel"
        return f'Here: {{"use_case": "{name}", "skills": ["{name} words", "care"]}}'
    if prompt.startswith("Write 2 instructions"):
        use_case = re.search("use case (.*?) whose", prompt)[1]
        return f"1. easy {use_case} task\n2. tough {use_case} task"
    if prompt.startswith("What makes instructions"):
        return "1. Add a constraint.\n2. Ask for reasons."
    if prompt.startswith("Rewrite this"):
        return "tough rewritten " + prompt.rsplit("\n\n", 1)[1].removeprefix("easy ")
    if prompt.startswith("Two answers"):
        a, b = re.search("Answer A:\n(.*)\n\nAnswer B:\n(.*)", prompt).groups()
        return f"Score A: {SCORES[a] + 1}\nScore B: {SCORES[b]}"  # the first one is preferred a little
    return "strong"


@pytest.fixture
def policy(monkeypatch):
    """Answers tough instructions worse than the writer, others alike."""
    monkeypatch.setattr(PolicySpeaker, "ask_all", lambda self, prompts, how: [weak(text) for text in prompts])


def weak(text: str) -> str:
    return "weak" if "tough" in text else "alike"


def stage(**settings):
    return build("stage", {"name": "codeclm", "writer": Scripted(script), "per_seed": 2, **settings})


def test_easy_instructions_are_rewritten_and_hard_ones_stay(policy):
    out = list(stage()(SEEDS, nobody()))
    assert {row["use_case"] for row in out} == {"poetry", "travel"}  # all that were encoded
    prompts = {row["prompt"] for row in out}
    assert "tough poetry task" in prompts and "tough rewritten poetry task" in prompts
    assert len(out) == 4 and all(row["completions"] == ["strong"] and row["gap"] == 7 for row in out)
    assert all(row["skills"][1] == "care" for row in out)


def test_the_better_answer_may_be_the_policys(policy, monkeypatch):
    monkeypatch.setitem(SCORES, "weak", 10)
    monkeypatch.setitem(SCORES, "strong", 4)
    out = list(stage(iterations=0)(SEEDS, nobody()))
    assert out and all(row["completions"] != ["strong"] and row["gap"] < 0 for row in out)
    assert {row["provenance"]["answer"] for row in out} == {"policy"}


def test_the_order_of_answers_does_not_matter():
    codec, roles = stage(), nobody()
    author = Author(codec, roles, codec.writer)
    gap = codec.difference(author, "x", "strong", "weak")
    assert gap == 7 == -codec.difference(author, "x", "weak", "strong")


def test_no_more_than_so_many_iterations(policy, monkeypatch):
    monkeypatch.setitem(SCORES, "weak", 9)
    codec, roles = stage(iterations=2), nobody()
    assert list(codec(SEEDS, roles)) == [] and {*roles.dropped} == {"a", "b"}
    rewritten = [prompt for prompt in codec.writer.prompts if prompt.startswith("Rewrite this")]
    assert len(rewritten) == 2 * 4
