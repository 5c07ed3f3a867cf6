"""rejection_sampling: what is accepted is what is learned; with one answer it is best-of-n distillation."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from helpers.rounds import Table, perform
from luthier.recipe.read import name_of
from luthier.registry import build

NAMES = ["a", "a a", "a a a", "b"]
PROMPTS = [{"id": str(p), "prompt": [p]} for p in range(6)]
LENGTH = {"name": "length"}


def test_accepted_answers_are_learned(recipe, tmp_path):
    plan = {"name": "rejection_sampling", "n": 12, "reward": LENGTH, "least": 2.0, "most": None}
    rounds, _ = perform(plan, recipe, Table(torch.zeros(6, 4)), PROMPTS, NAMES, tmp_path)
    for row in rounds[0].rows:
        assert row["scores"] == sorted(set(row["scores"]), reverse=True) and min(row["scores"]) >= 2
    probabilities = rounds[0].after.log_policy().detach().exp()
    assert float(probabilities[:, 1:3].sum(-1).min()) > 0.9


def test_one_answer_is_the_best_of_n(recipe, tmp_path):
    plan = {"name": "rejection_sampling", "n": 12, "reward": LENGTH}
    rounds, _ = perform(plan, recipe, Table(torch.zeros(6, 4)), PROMPTS, NAMES, tmp_path)
    assert all(len(row["completions"]) == 1 for row in rounds[0].rows)
    raft = build("plan", "raft")
    assert raft.rounds and build("plan", "rejection_sampling").most == 1


def test_the_untuned_model_is_the_first_champion(recipe):
    """Where no round answers as well as the model before the first one, a run without training holds it."""

    def played(rewards, **settings):
        plan = build("plan", {"name": "rejection_sampling", "rounds": 3, **settings})
        play = plan.recipes(recipe.but(evaluate=["loss"]))
        asked, before = [next(play)], 0.5
        try:
            for i, after in enumerate(rewards):
                measured = {"generated_reward": before}, {"generated_reward": after}
                done = SimpleNamespace(
                    folder=f"r{i}", before=measured[0], after=measured[1], stats={}, notes=[]
                )
                before = after
                asked.append(play.send(done))
        except StopIteration as end:
            return asked, end.value

    asked, end = played([0.3, 0.4, 0.45, 0.5])
    assert end.folder == "r3" and len(asked) == 4 and "before the first one" in end.notes[0]
    assert asked[3].objective is None and asked[3].init_from is None and not asked[3].stages
    assert [name_of(e) for e in asked[3].evaluate] == ["loss", "generate"] and len(end.stats["rounds"]) == 3
    assert played([0.3, 0.6, 0.55])[1].folder == "r1"
    assert played([0.3, 0.4, 0.45], result="last")[1].folder == "r2"


def test_rows_without_a_good_answer_leave():
    rows = [{"id": "x", "prompt": "p", "completions": ["a", "b"], "scores": [0.0, 0.2], "threshold": 0.5}]
    assert build("stage", "accept")(rows, nobody()) == []
    assert build("stage", {"name": "accept", "least": 0.1})(rows, nobody())[0]["completions"] == ["b"]


def nobody():
    from luthier.clock import Clock

    return SimpleNamespace(clock=Clock(), warn=lambda sentence: None)
