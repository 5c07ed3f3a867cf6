"""rlhf_workflow: the reward rises in each round, on pairs of its own policy and prompts of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import luthier
from helpers.plans import played, report
from helpers.rounds import Table, expected_reward, perform
from helpers.rows import SUMS
from luthier.methods.plans.rounds._rounds import reference_at
from luthier.methods.stages.rollout.provenance import weights_hash
from luthier.registry import build
from luthier.storage import files

NAMES = ["a", "a a", "a a a", "a a a a"]
LENGTH = {"name": "length"}  # the reward is known: a word is worth 1
PROMPTS = [{"id": str(p), "prompt": [p]} for p in range(6)]
PLAN = {"name": "rlhf_workflow", "rounds": 3, "n": 8, "reward": LENGTH}


def table(answers: int = 4) -> Table:
    return Table(0.5 * torch.randn(6, answers, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("reference", ["start", "round"])
def test_the_reward_rises_round_by_round(recipe, tmp_path, reference):
    policy = table()
    plan = {**PLAN, "reference": reference}
    rounds, end = perform(plan, recipe, policy, PROMPTS, NAMES, tmp_path, steps=10, lr=0.2)
    judge = build("reward", LENGTH)
    rewards = [expected_reward(r.before, judge, PROMPTS, NAMES) for r in rounds]
    rewards.append(expected_reward(rounds[-1].after, judge, PROMPTS, NAMES))
    assert all(b > a for a, b in zip(rewards, rewards[1:], strict=False)), rewards
    prompts = [{row["id"] for row in r.rows} for r in rounds]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    for number, one in enumerate(rounds):
        starts = policy if number == 0 else rounds[number - 1].after
        for row in one.rows:
            assert row["scores"][0] > row["scores"][1]
            assert row["provenance"] == {"round": number, "sampler": weights_hash(starts), "seed": 0}
        expected = one.before if reference == "round" else policy
        assert weights_hash(one.reference) == weights_hash(expected)
    table_of_rounds = end.stats["rounds"]
    assert [row["round"] for row in table_of_rounds] == [0, 1, 2]
    assert {"distinct_2", "answer_entropy", "reward", "equal_rewards"} <= table_of_rounds[0].keys()


def test_pairs_of_all_rounds_length_and_temperatures(recipe, tmp_path):
    plan = {
        **PLAN,
        "accumulate": True,
        "temperatures": [0.7, 1.3],
        "length_penalty": 2.0,
        "fresh_prompts": False,
    }
    rounds, _ = perform(plan, recipe, table(), PROMPTS, NAMES, tmp_path, steps=2)
    sizes = [len(r.rows) for r in rounds]
    own = [sum(row["provenance"]["round"] == k for row in r.rows) for k, r in enumerate(rounds)]
    assert sizes == [own[0], own[0] + own[1], sum(own)]
    for row in rounds[0].rows:  # a word is worth 1 and costs 2
        assert row["completions"][0][0] < row["completions"][1][0]
        assert len(row["temperatures"]) == 2


def test_an_offline_round_is_plain_dpo(recipe):
    asked, _ = played({**PLAN, "rounds": 1, "offline": True, "judged": 0}, recipe, [report("x")])
    plain = recipe.but(
        objective={"name": "dpo", "beta": 0.1}, roles={"reference": "base"}, num_train_epochs=1
    )
    assert asked[0].fingerprint() == plain.fingerprint()


def test_the_reference_follows_the_start(recipe):
    assert reference_at("start", recipe)["reference"] == "base"
    full = recipe.but(tuner="full")
    assert reference_at("start", full)["reference"] == {"name": "model", "model": recipe.model}
    assert reference_at("start", full.but(init_from="sft"))["reference"]["model"] == "sft"
    assert reference_at("round", full)["reference"] == "initial"
    assert reference_at("round", full.but(roles={"reference": "base"}))["reference"] == "base"


def test_rounds_end_where_samples_become_alike_or_nothing_rises(recipe, tmp_path):
    plan = {**PLAN, "fresh_prompts": False, "rounds": 6, "collapse": 0.9}
    rounds, end = perform(plan, recipe, table(), PROMPTS, NAMES, tmp_path / "a", steps=60, lr=0.5)
    assert len(rounds) < 6 and end.notes
    plan = {**PLAN, "fresh_prompts": False, "rounds": 6, "patience": 1, "result": "best"}
    rounds, end = perform(plan, recipe, table(), PROMPTS, NAMES, tmp_path / "b", steps=60, held_out=PROMPTS)
    assert len(rounds) < 6 and "has not risen" in end.notes[-1] or "nothing is left" in end.notes[-1]
    assert end.after["generated_reward"] == max(r["held_out_after"] for r in end.stats["rounds"])


@pytest.mark.long
def test_rounds_on_a_network(base, tmp_path):
    """Two rounds on a small network: the rows note which weights sampled them, and the report has a table."""
    plan = {"name": "rlhf_workflow", "rounds": 2, "n": 3, "max_new_tokens": 4, "judged": 4}
    plan["reward"] = {"name": "length", "of": "characters"}
    change = {"plan": plan, "data": SUMS[:16], "max_steps": 2, "eval_data": 0.25, "tuner": "lora"}
    done = luthier.tune(base | change, folder=tmp_path)
    first, second = (files.read_rows(Path(run) / "rows.jsonl") for run in done.runs)
    hashes = [{row["provenance"]["sampler"] for row in rows} for rows in (first, second)]
    assert len(hashes[0]) == len(hashes[1]) == 1 and hashes[0] != hashes[1]
    assert not {row["id"] for row in first} & {row["id"] for row in second}
    assert [row["round"] for row in done.stats["rounds"]] == [0, 1]
    assert done.stats["rounds"][1]["reward"] > 0 and "held_out_after" in done.stats["rounds"][1]
    assert luthier.Report.read(done.runs[0]).stats["stages"]["samples"] > 0
