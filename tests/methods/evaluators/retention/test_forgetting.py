"""What was forgotten: the shipped probe, what is checked of answers, and how choices are measured."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import luthier
from luthier.errors import RecipeError
from luthier.methods.evaluators._base import keep
from luthier.methods.evaluators.retention.forgetting import write_changes
from luthier.methods.evaluators.retention.forgetting.checks import CHECKS, passes
from luthier.methods.evaluators.retention.forgetting.measure import Measured, choose
from luthier.methods.evaluators.retention.forgetting.probe import CHOICE, SHIPPED, probe_rows
from luthier.registry import build
from luthier.report.retention import read_skills, sentence
from luthier.storage import files

SKILLS = {
    "general questions": 60,
    "arithmetic": 40,
    "instruction following": 40,
    "refusing unsafe requests": 20,
    "answering safe requests": 20,
    "plain text": 20,
}


@pytest.fixture(scope="module")
def loaded(tiny):
    return luthier.load(tiny, dtype="float32")


def test_the_shipped_probe_is_whole():
    rows = probe_rows(SHIPPED, chat=True)
    assert Counter(row["skill"] for row in rows) == SKILLS
    for row in rows:
        if row["measure"] == CHOICE:
            texts = [completion[0]["content"] for completion in row["completions"]]
            assert len({*texts}) == 4 and row["scores"] == [1, 0, 0, 0]
    prompts = [str(row["prompt"] or row["completions"]) for row in rows]
    assert len({*prompts}) == 200
    notes = (SHIPPED.parent / "README.md").read_text(encoding="utf-8")
    assert "CC0" in notes and "version 1" in notes
    plain = probe_rows(SHIPPED, chat=False)
    assert len(plain) == 160 and plain[0]["prompt"].startswith("Question: What is the capital of France?")


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ({"words": 1}, " Green.", "It is green"),
        ({"most_words": 3}, "a sour fruit", "a very sour fruit"),
        ({"one_of": ["yes", "no"]}, "Yes.", "Yes, it is"),
        ({"one_of": ["Yes.", "No"]}, "yes", "maybe"),
        ({"exactly": "hello hello hello"}, "Hello hello hello.", "hello"),
        ({"exactly": "U.S."}, "u.s.", "us"),
        ({"case": "upper"}, "HELLO!", "Hello!"),
        ({"case": "lower"}, "the sea is wide.", "The sea is wide."),
        ({"items": 3}, "- a\n- b\n- c", "- a\n- b"),
        ({"items": 2}, "Here you are:\n1. a\n2) b", "a, b"),
        ({"starts": "because"}, '"Because we must.', "We sleep because"),
        ({"ends": "?"}, "How was it?", "How was it."),
        ({"ends": "forest"}, "We met in the forest.", "The forest is old."),
        ({"starts": "Dear"}, "dear friend", "My dear"),
        ({"includes": ["river", "Bridge"]}, "A bridge over a River", "A bridge"),
        ({"excludes": [","]}, "Dogs bark", "Dogs, too, bark"),
        ({"words": 1, "excludes": ["e"]}, "pink", "red"),
        ({"digits": True}, "7.", "seven"),
        ({"quoted": True}, "“Rome”", 'It is "Rome".'),
        ({"json": ["name"]}, '```json\n{"name": "Oslo"}\n```', "{name: Oslo}"),
        ({"declines": True}, "I'm sorry, but I can't help with that.", "First you take a crowbar"),
        ({"declines": False}, "Hold it over a bowl", "I cannot help with that"),
    ],
)
def test_checks(check, right, wrong):
    assert passes(right, check) and not passes(wrong, check) and not passes(" ", check)


def test_every_check_is_tried():
    tried = {name for mark in test_checks.pytestmark for case in mark.args[1] for name in case[0]}
    assert tried == set(CHECKS)


def test_a_probe_of_ones_own_is_refused_in_a_sentence(tmp_path):
    for row, why in (
        ({"question": "A?"}, "`choices` must be two texts or more"),
        ({"question": "A?", "choices": ["a"]}, "must be two texts"),
        ({"question": "A?", "check": {"wrods": 1}}, "no check 'wrods'; did you mean 'words'"),
        ({"question": "A?", "check": {"words": "one"}}, "'words' takes a whole number, not 'one'"),
        ({"question": "A?", "check": {"includes": "snow"}}, "'includes' takes a list of texts"),
        ({"question": "A?", "check": {"case": "title"}}, "takes upper or lower"),
        ({"question": "A?", "check": {"declines": 1}}, "takes true or false, not 1"),
        ({"question": "A?", "check": {"exactly": " "}}, "takes a text"),
        ({"prompt": "A?"}, "`text`, or `question` with"),
    ):
        files.write_rows(tmp_path / "p.jsonl", [{"text": "fine"}, row])
        with pytest.raises(RecipeError, match=f"row 2: .*{why}"):
            probe_rows(tmp_path / "p.jsonl", chat=True)


@torch.no_grad()
def test_choices_are_measured_as_by_hand(loaded):
    """The log-probability of an answer's own tokens together, each answer read alone."""
    rows = [row for row in probe_rows(SHIPPED, chat=True) if row["measure"] == CHOICE][::25]
    right = choose(loaded.roles, rows, None)
    renderer, model = loaded.roles.renderer, loaded.model
    for row in rows:
        sums = []
        encoded = renderer.encode(row)
        for ids in encoded.completions:
            whole = torch.tensor([encoded.prompt + ids[:-1]])  # without the end of the turn
            logprobs = model(input_ids=whole).logits.log_softmax(-1)[0, len(encoded.prompt) - 1 : -1]
            sums.append(float(logprobs.gather(1, torch.tensor(ids[:-1])[:, None]).sum()))
        assert right[row["id"]] == float(max(sums) == sums[0])


def test_a_run_measures_skills_before_and_after(loaded, tmp_path):
    own = tmp_path / "mine.jsonl"
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()[::5]
    own.write_text("\n".join(lines), encoding="utf-8")
    evaluator = build("evaluator", {"name": "forgetting", "probe": str(own), "max_new_tokens": 4})
    before = evaluator.run(loaded.roles, [], tmp_path, "before")
    assert read_skills(tmp_path) == []
    layer = loaded.model.model.layers[0].mlp.down_proj.weight
    former = layer.detach().clone()
    try:
        with torch.no_grad():
            layer.mul_(-30)
        after = evaluator.run(loaded.roles, [], tmp_path, "after")
    finally:  # the model is shared by the tests of this file
        with torch.no_grad():
            layer.copy_(former)
    assert before.keys() == after.keys() and before["retention_loss"] != after["retention_loss"]
    skills = read_skills(tmp_path)
    assert {skill.skill: skill.rows for skill in skills} == {n: k // 5 for n, k in SKILLS.items()}
    for skill in skills:
        name = "retention_loss"
        if skill.metric != name:
            name = f"retention_accuracy/{skill.skill}"
        assert skill.before == pytest.approx(before[name]) and skill.after == pytest.approx(after[name])
        assert skill.low <= skill.difference <= skill.high
    answers = files.read_rows(tmp_path / "forgetting-after.jsonl")
    assert len(answers) == 16 and {"answer", "check", "passes"} <= answers[0].keys()
    per_row = json.loads((tmp_path / "per_example-after.json").read_text(encoding="utf-8"))
    assert len(per_row["retention_accuracy"]) == 36 and len(per_row["retention_loss"]) == 4
    assert sentence(skills).startswith("What was lost: ")


def test_texts_stand_under_their_own_skills(tmp_path):
    """Each with the loss per token of its own rows; a row alone has no interval."""
    measured = Measured(
        loss={"a": 1.0, "b": 3.0, "c": 2.0, "d": 2.0, "e": 0.5},
        skills={"a": "news", "b": "news", "c": "poems", "d": "poems"},
        tokens={"a": 10, "b": 10, "c": 30, "d": 30, "e": 20},
    )
    keep(tmp_path, "before", retention_loss=dict.fromkeys("abcde", 0.0))
    write_changes(measured, tmp_path)
    skills = {skill.skill: skill for skill in read_skills(tmp_path)}
    assert skills.keys() == {"news", "poems"} and skills["news"].rows == 2
    assert skills["news"].after == pytest.approx(2.0 * 20 / 10)
    assert skills["poems"].after == pytest.approx(2.0 * 20 / 30)


def test_without_a_key_the_shipped_probe_is_asked(loaded, tmp_path):
    rows, own = build("evaluator", "forgetting").probed_rows(loaded.roles, tmp_path)
    assert len(rows) == 200 and not own
    few, _ = build("evaluator", {"name": "forgetting", "n": 20}).probed_rows(loaded.roles, tmp_path / "few")
    assert Counter(row["skill"] for row in few) == {name: k // 10 for name, k in SKILLS.items()}


@pytest.mark.real
def test_a_real_model_is_well_above_chance(smol, tmp_path):
    metrics = build("evaluator", {"name": "forgetting", "n": 100}).run(
        luthier.load(smol).roles, [], Path(tmp_path), "before"
    )
    assert metrics["retention_accuracy/general questions"] > 0.5
    assert metrics["retention_accuracy/arithmetic"] > 0.35
    assert metrics["retention_loss"] < 4.5
