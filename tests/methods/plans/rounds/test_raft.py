"""raft: stops when the reward no longer rises; rounds sample score choose and learn; makes a rewarded habit
more frequent; of one sample is sft on own samples.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import luthier
from helpers.plans import ROWS, played, report
from helpers.rows import SUMS
from luthier.recipe.validate import validate
from luthier.registry import build
from luthier.storage import files
from luthier.toy import bandit


def raft(**settings):
    return {"name": "raft", "rounds": 5, "n": 4, "max_new_tokens": 4, **settings}


@pytest.mark.parametrize(
    "rewards, runs, stands",
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5], 5, "r4"),
        ([0.1, 0.3, 0.3], 3, "r1"),
        ([0.4, 0.2], 2, "r0"),
        ([None] * 5, 5, "r4"),
    ],
)
def test_raft_stops_when_the_reward_no_longer_rises(recipe, rewards, runs, stands):
    reports = [
        report(f"r{k}", **({} if v is None else {"generated_reward": v})) for k, v in enumerate(rewards)
    ]
    asked, end = played(raft(), recipe.but(start="s", evaluate=["loss", "generate"]), reports)
    assert len(asked) == runs and end.folder == stands
    assert [r.init_from for r in asked] == ["s", "r0", "r1", "r2", "r3"][:runs]
    # one held-out split
    assert [r.stages[0]["draw"] for r in asked] == list(range(runs)) and len({r.seed for r in asked}) == 1
    assert [e if isinstance(e, str) else e["name"] for e in asked[0].evaluate] == ["loss", "generate"]


@pytest.mark.long
def test_raft_rounds_sample_score_choose_and_learn(base, tmp_path):
    """Kept rows are the best of what was drawn; two rounds draw differently, and the second from the first's
    end.
    """
    prompts = [{"prompt": r["prompt"], "answer": r["answer"]} for r in SUMS[:16]]
    plan = raft(rounds=2, n=8, max_new_tokens=3, kl_coef=0.0)
    done = luthier.tune(
        base | {"data": prompts, "plan": plan, "tuner": "full", "max_steps": 3, "eval_data": 0.25},
        folder=tmp_path,
    )
    first, second = (files.read_rows(Path(a) / "rows.jsonl") for a in done.runs)
    assert len(first) == 16 - done.stats["held_out_rows"] and all(
        len(r["completions"]) == len(r["scores"]) == 1 for r in first
    )
    assert [r["completions"] for r in first] != [r["completions"] for r in second]
    assert "generated_reward" in done.after


@pytest.mark.long
def test_raft_makes_a_rewarded_habit_more_frequent(base, tmp_path):
    """Reward: one letter or digit is said. A few rounds raise how often that is."""
    say = [{"prompt": f"say {k}:", "answer": list("abcdefghijklmnopqrstuvwxyz0123456789")} for k in range(40)]
    plan = raft(rounds=4, n=16, max_new_tokens=1, least=1.0)
    change = {"data": say, "plan": plan, "max_steps": 4, "learning_rate": 3e-3, "eval_data": 0.25}
    done = luthier.tune(base | change, folder=tmp_path)
    kept = [len(files.read_rows(Path(a) / "rows.jsonl")) for a in done.runs]
    assert done.after["generated_reward"] == 1.0 and kept[-1] >= kept[0]


@pytest.mark.long
def test_raft_of_one_sample_is_sft_on_own_samples(base, tmp_path):
    plan = raft(rounds=1, n=1, max_new_tokens=3)
    done = luthier.tune(base | {"plan": plan, "eval_data": 0.25}, folder=tmp_path / "raft")
    own = {"stages": [{"name": "rollout", "n": 1, "max_new_tokens": 3}], "eval_data": 0.25}
    plain = luthier.tune(base | own, folder=tmp_path / "sft")
    assert luthier.Report.read(done.runs[0]).losses == plain.losses


def test_a_price_on_leaving_the_base_model_wants_a_reference(recipe):
    validate(recipe.but(plan=raft(kl_coef=0.1)), ROWS)
    asked, _ = played(raft(kl_coef=0.1, rounds=1), recipe, [report("x")])
    assert [s if isinstance(s, str) else s["name"] for s in asked[0].stages] == [
        "rollout",
        "score",
        "kl_penalty",
        "best",
    ]


def measured(folder: str, before: float, after: float):
    made = report(folder, generated_reward=after)
    made.before = {"generated_reward": before}
    return made


def test_the_untuned_model_is_the_first_champion(recipe):
    """Where the first round is worse than the model as it was, a run without training holds that model."""
    asked, end = played(
        raft(), recipe.but(evaluate=["loss"]), [measured("r0", 0.6, 0.5), measured("start", 0.6, 0.6)]
    )
    assert end.folder == "start" and len(asked) == 2
    assert asked[1].objective is None and asked[1].init_from is None and not asked[1].stages
    asked, end = played(raft(), recipe, [measured("r0", 0.4, 0.5), measured("r1", 0.5, 0.5)])
    assert end.folder == "r0"


def test_raft_returns_a_model_that_is_not_worse(base, tmp_path):
    """A rate that ruins the model: what stands at the end is the model from before."""
    prompts = [{"prompt": r["prompt"], "answer": r["answer"]} for r in SUMS[:16]]
    change = {"data": prompts, "tuner": "full", "max_steps": 2, "learning_rate": 1.0, "eval_data": 0.25}
    reward = {"name": "length", "of": "characters"}
    plan = raft(rounds=2, n=2, max_new_tokens=3, reward={**reward, "scale": -1.0})
    done = luthier.tune(base | change | {"plan": plan}, folder=tmp_path)
    first = luthier.Report.read(done.runs[0])
    assert done.after["generated_reward"] >= first.before["generated_reward"]


def test_the_price_is_for_leaving_the_untuned_model_whatever_the_tuner(recipe):
    for tuner, reference in (("lora", None), ("full", {"name": "model", "model": recipe.model})):
        asked, _ = played(raft(kl_coef=0.1, rounds=2), recipe.but(tuner=tuner), [report("a"), report("b")])
        assert [r.roles.get("reference") for r in asked] == [reference, reference]
    own = recipe.but(tuner="full", roles={"reference": "initial"})
    asked, _ = played(raft(kl_coef=0.1, rounds=1), own, [report("a")])
    assert asked[0].roles["reference"] == "initial"


@pytest.mark.long
def test_in_the_second_round_of_full_tuning_the_price_is_not_zero(base, tmp_path, monkeypatch):
    """The reference of a round is the untuned model, not what the round starts from."""
    from luthier.methods.stages.rollout import kl_penalty

    gaps, real = [], kl_penalty.completion_logprobs

    def seen(who, roles, rows, size):
        out = list(real(who, roles, rows, size))
        gaps.append(sum(sum(map(sum, row)) for row in out))
        return out

    monkeypatch.setattr(kl_penalty, "completion_logprobs", seen)
    prompts = [{"prompt": r["prompt"], "answer": r["answer"]} for r in SUMS[:16]]
    change = {"data": prompts, "tuner": "full", "max_steps": 2, "learning_rate": 3e-3}
    plan = raft(rounds=2, n=2, max_new_tokens=3, kl_coef=0.1)
    luthier.tune(base | change | {"plan": plan, "evaluate": [], "eval_data": 0}, folder=tmp_path)
    policy, reference = gaps[2:4]
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-3) and abs(policy - reference) > 0.1


def round_of_raft(policy, prompts: int, rng: torch.Generator, steps: int = 12) -> None:
    """Four samples for each prompt, the best of them by the stage `best`, and supervised steps on those."""
    reward = torch.arange(8.0)  # how often an answer has the letter a
    drawn = torch.multinomial(policy.log_policy().detach().exp(), 4 * prompts, True, generator=rng)
    rows = bandit.pulled(drawn.view(prompts, 4).tolist(), reward)
    kept = build("stage", "best")(rows, None)
    adam = torch.optim.Adam(policy.parameters(), lr=0.1)
    for _ in range(steps):
        adam.zero_grad()
        bandit.average(build("objective", "sft"), bandit.roles_of(policy), kept).backward()
        adam.step()


@pytest.mark.long
def test_five_rounds_rise_and_beat_one_of_as_many_samples():
    """The expected reward rises round by round, over seeds, and ends above that of one round with all
    samples at once.
    """
    reward, several, single = torch.arange(8.0), torch.zeros(6), 0.0
    base = -0.5 * torch.arange(8.0)
    for seed in range(4):
        policy, rng = bandit.Arms(base), torch.Generator().manual_seed(seed)
        rewards = [policy.log_policy().exp() @ reward]
        for _ in range(5):
            round_of_raft(policy, 48, rng)
            rewards.append(policy.log_policy().exp() @ reward)
        several += torch.stack(rewards).detach() / 4
        once = bandit.Arms(base)
        round_of_raft(once, 240, torch.Generator().manual_seed(seed), steps=60)
        single += float(once.log_policy().detach().exp() @ reward) / 4
    assert (several.diff() > 0.1).all(), several
    assert several[-1] > single + 1, (several, single)
