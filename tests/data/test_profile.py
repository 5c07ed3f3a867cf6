"""Looking at rows and at preferences: what a file can feed, how pairs are ranked, and losses side by side."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import luthier
from helpers.rows import PAIRS, SUMS, UNPAIRED
from luthier.cli import app
from luthier.data.profile import objectives_for
from luthier.data.quarantine import count_reasons
from luthier.methods.evaluators.quality.preference import Totals, checkup
from luthier.registry import names
from luthier.storage import files
from luthier.text.preview import preview


def luth(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def test_what_rows_can_feed():
    assert {f["objective"] for f in objectives_for({"completions"})} == set(names("objective"))
    pairs = {f["objective"]: f for f in preview(PAIRS, "toy:lm-small")["feeds"]}
    assert pairs["dpo"]["feeds"] == pairs["kto"]["feeds"] == pairs["sft"]["feeds"] == "yes"
    assert pairs["dpo"]["why"] == "with roles: reference" and pairs["simpo"]["why"] == ""
    assert pairs["fait"]["feeds"] == "with a stage" and "diff_masks" in pairs["fait"]["why"]
    assert (
        pairs["morepair"]["feeds"] == "no"
        and "stage rationale computes it from rationale" in pairs["morepair"]["why"]
    )
    plain = {f["objective"]: f for f in preview(SUMS, "toy:lm-small")["feeds"]}
    assert (
        "prompt/chosen/rejected" in plain["dpo"]["why"]
        and "exact_match" in plain["grpo"]["why"]
        and plain["sft"]["feeds"] == "yes"
        and plain["grpo"]["feeds"] == "with a stage"
    )
    unpaired = {f["objective"]: f["feeds"] for f in preview(UNPAIRED, "toy:lm-small")["feeds"]}
    assert unpaired["kto"] == unpaired["bco"] == "yes" and unpaired["dpo"] != "yes"


def test_a_file_is_told_at_the_command_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    bad = {"prompt": "x", "chosen": "same", "rejected": "same"}
    path.write_text("".join(json.dumps(r) + "\n" for r in [*PAIRS, bad, bad]), encoding="utf-8")
    said = luth("data", path, "--model", "toy:lm-small", "--examples", 1)
    assert said.exit_code == 0, said.output
    assert "25 of 27 rows can be read, as 'preference'" in said.stdout
    assert "2 unusable: chosen and rejected are the same (first: pairs.jsonl:26)" in said.stdout
    assert "0+0=⟦0" in said.stdout and "dpo" in said.stdout
    found = json.loads(luth("data", path, "--model", "toy:lm-small", "--json").stdout)
    assert found["bad"] == [
        {"reason": "chosen and rejected are the same", "rows": 2, "first": "pairs.jsonl:26"}
    ]
    assert luth("data", tmp_path / "none.jsonl").exit_code == 2


def test_the_first_lines_say_what_rows_are_and_what_fits(tmp_path):
    rows = [
        {"prompt": f"Capital {i}?", "chosen": " Oslo", "rejected": " Rome", "origin": "me"} for i in range(9)
    ]
    rows += [rows[0], {**rows[1], "chosen": " Lima"}, {**rows[2], "rejected": " word" * 400}]
    rows += [{"prompt": f"{i}", "chosen": "x", "rejected": "x"} for i in range(3)]
    rows += [{"prompt": "x", "chosen": i, "rejected": None} for i in range(2)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    output = luth("data", path, "--model", "toy:lm-small", "--max-length", 64).stdout
    first, second, *_ = output.splitlines()
    assert "as 'preference': `chosen` is preferred to `rejected`" in first
    assert second == "objective to begin with: dpo (with roles: reference)"
    for words in (
        "tokens at 50 / 90 / 99 / 100%: row ",
        "1 rows are cut at 64 tokens",
        "1 rows repeat an earlier row",
        "2 prompts have several different answers",
        "not learned from (rewards and stages may read them): origin",
        "3 unusable: chosen and rejected are the same (first: pairs.jsonl:13)",
        "--all lists them",
    ):
        assert words in output, words
    assert "simpo" not in output and "simpo" in luth("data", path, "--all").stdout


def test_reasons_that_differ_in_details_alone_are_one():
    bad = [
        {"reason": f"turn {i} of messages has the unknown role 'x{i}'", "where": f"a:{i}"} for i in range(5)
    ]
    assert count_reasons([*bad, {"reason": "not JSON", "where": "b"}]) == [
        {"reason": "turn 0 of messages has the unknown role 'x0'", "rows": 5, "first": "a:0"},
        {"reason": "not JSON", "rows": 1, "first": "b"},
    ]


def test_the_preference_checkup_by_hand():
    def t(*v):
        return torch.tensor(v, dtype=torch.float64)

    other = Totals(t(-1.0, -2.0), t(-1.5, -1.0), t(1, 2), t(3, 4))
    own = Totals(t(-0.5, -2.0), t(-2.5, -2.5), t(1, 2), t(3, 4))
    found = checkup(own, other)
    assert (
        found["ranking_accuracy"] == 1.0
        and found["reference_ranking_accuracy"] == 0.5
        and found["reward_accuracy"] == 1.0
    )
    assert found["chosen_drift"] == pytest.approx(0.25) and found["rejected_drift"] == pytest.approx(-1.25)
    assert found["reward_margin"] == pytest.approx(1.5) and found["length_ratio"] == 1.0
    assert found["length_correlation"] < -0.8
    same = checkup(other, other)
    assert (
        same["reward_accuracy"] == 0.5 and same["reward_margin"] == 0.0 and "length_correlation" not in same
    )
    longer = checkup(Totals(t(0.0), t(0.0), t(2), t(6)), Totals(t(0.0), t(-1.0), t(2), t(6)))
    assert longer["length_ratio"] == 3.0, "what it prefers is the longer, worse answer"


@pytest.mark.slow
@pytest.mark.long
def test_dpo_is_seen_by_the_checkup(tiny, tmp_path):
    recipe = {
        "model": tiny,
        "data": PAIRS,
        "eval_data": 0,
        "objective": "dpo",
        "learning_rate": 1e-2,
        "max_steps": 8,
        "dtype": "float32",
        "per_device_train_batch_size": 8,
        "evaluate": ["preference"],
        "save_steps": 100,
    }
    report = luthier.tune(recipe, folder=tmp_path / "run")
    assert report.before["reward_margin"] == pytest.approx(0, abs=1e-4) and report.before[
        "reward_accuracy"
    ] == pytest.approx(0.5, abs=0.3)
    assert report.after["reward_accuracy"] > 0.9 and report.after["reward_margin"] > 0.5
    found = json.loads(luth("inspect", tiny, tmp_path / "run", "--preference", "--json").stdout)
    assert found["tuned"]["metrics"]["reward_margin"] == pytest.approx(
        report.after["reward_margin"], rel=1e-3
    )
    assert found["base"]["metrics"]["reward_margin"] == 0
    assert "reward margin (nats)" in luth("inspect", tiny, tmp_path / "run", "--preference").stdout
    (tmp_path / "sums.jsonl").write_text(json.dumps(SUMS[0]) + "\n", encoding="utf-8")
    refused = luth("inspect", tiny, tmp_path / "run", "--preference", "--data", tmp_path / "sums.jsonl")
    assert refused.exit_code == 2 and "chosen and a rejected completion" in refused.output


@pytest.mark.slow
@pytest.mark.long
def test_losses_side_by_side_and_who_plays_the_judge_by_length(tiny, tmp_path):
    longer = [{"prompt": f"{i}", "chosen": f"{i}" * 12, "rejected": f"{i}"} for i in range(12)]
    objectives = ["dpo", "kto", "ipo", "simpo", "orpo"]
    recipe = {
        "model": tiny,
        "data": longer,
        "eval_data": longer[:4],
        "learning_rate": 5e-3,
        "max_steps": 12,
        "dtype": "float32",
        "tuner": "full",
        "per_device_train_batch_size": 6,
        "save_steps": 100,
        "evaluate": [],
        "plan": {
            "name": "preference_losses",
            "objectives": objectives,
            "reward": "length",
            "judged": 4,
            "max_new_tokens": 24,
            "flag": 1.01,
        },
    }
    report = luthier.tune(recipe, folder=tmp_path / "plan")
    table = report.stats["table"]
    assert [line["objective"] for line in table] == objectives
    assert (
        all(line["length ratio"] > 0 for line in table)
        and max(line["reward"] for line in table) == report.after["generated_reward"]
    )
    flagged = [line for line in table if line["length ratio"] > 1.01]
    assert len([n for n in report.notes if "may prefer length" in n]) == len(flagged)
    kept = json.loads((tmp_path / "plan" / "report.json").read_text(encoding="utf-8"))
    assert kept["stats"]["table"] == table


@pytest.mark.long
def test_what_is_declined_before_and_after(tmp_path):
    """toy:chat declines unsafe requests and them alone; toy:lm, asked the same in chat, does
    otherwise or not.
    """
    from luthier.registry import build

    made = build("evaluator", {"name": "refusals", "n": 6})
    assert (
        made.declines("I cannot help with that.")
        and made.declines("  Sorry, no.")
        and not made.declines("Mix it. " * 20 + "I cannot")
    )
    rows = [
        {"id": "0", "prompt": "1+1=", "completions": ["2"]},
        {"id": "1", "prompt": "How?", "completions": ["Sorry, I cannot help."]},
    ]
    loaded = luthier.load("toy:chat")
    found = build(
        "evaluator", {"name": "refusals", "data": {"path": "toy:chat/test", "n": 300}, "n": 12}
    ).run(loaded.roles, rows, tmp_path, "before")
    assert found["refused_unsafe"] > 0.8 and found["refused_safe"] < 0.2
    told = files.read_rows(tmp_path / "refusals-before.jsonl")
    assert {t["unsafe"] for t in told} == {True, False} and all(t["answer"] for t in told)
    again = build("evaluator", "refusals").run(loaded.roles, [], tmp_path, "after")
    assert again == found, "the same requests, kept"
    (tmp_path / "other").mkdir()
    loaded.model.config.name_or_path = ""
    assert build("evaluator", "refusals").run(loaded.roles, rows[:1], tmp_path / "other", "before") == {}
