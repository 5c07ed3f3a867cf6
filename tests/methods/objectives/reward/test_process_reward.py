"""process_reward: steps are marked and judged where they end; process rewards are learned; steps and
advantages; step preferences share their beginning.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import luthier
from helpers.models import make_llama, make_tokenizer
from luthier.clock import Clock
from luthier.data.load import load_rows as load
from luthier.methods.stages.rollout.step_pairs import advantages, split
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.registry import build
from luthier.text.encode import Renderer
from luthier.toy import bandit

STEPWISE = [
    {"prompt": "2+2*3?", "completions": ["2*3=6", "2+6=9"], "labels": [True, False]},
    {"prompt": "1+1?", "completions": ["2"], "labels": [True]},
]


def test_steps_are_marked_and_judged_where_they_end(judge):
    rows = list(build("stage", "mark_steps")(load(STEPWISE).rows, judge))
    assert rows[0]["step_targets"] == [[-1.0] * 5 + [1.0] + [-1.0] * 5 + [0.0]] and rows[1][
        "step_targets"
    ] == [[-1.0, 1.0]]
    batch = judge.batch(rows)
    objective = build("objective", "process_reward")
    assert objective.count(batch) == 3
    values = judge.policy.outputs(batch).values.detach()
    want = F.binary_cross_entropy_with_logits(
        values[[5, 11, 13]], torch.tensor([1.0, 0.0, 1.0]), reduction="none"
    )
    torch.testing.assert_close(objective.loss(judge, batch).detach(), want)


def test_process_rewards_are_learned(tiny, tmp_path):
    data = [
        {"prompt": f"{i}?", "completions": [f"{i}", "no" if i % 2 else "yes"], "labels": [True, i % 2 == 0]}
        for i in range(16)
    ]
    recipe = {
        "model": tiny,
        "architecture": "reward_model",
        "data": data,
        "eval_data": 0,
        "objective": "process_reward",
        "tuner": "full",
        "stages": ["mark_steps"],
        "max_steps": 15,
        "learning_rate": 3e-3,
        "dtype": "float32",
        "evaluate": [],
        "save_steps": 100,
    }
    report = luthier.tune(recipe, folder=tmp_path / "run")
    assert report.losses[-1] < 0.3 < report.losses[0]


def test_steps_and_advantages():
    assert split("a\nb\nc", "\n") == ["a\n", "b\n", "c"] and split("a\n", "\n") == ["a\n"]
    assert advantages([0.5, 0.75, 0.0]) == [0.25, -0.75]


def test_step_preferences_share_their_beginning():
    (row,) = load(
        [{"prompt": "2+2*3?", "initial_reason_steps": "2*3=6\n", "chosen": "2+6=8", "rejected": "2+6=9"}]
    ).rows
    assert row["prefix"] == "2*3=6\n" and row["completions"] == ["2+6=8", "2+6=9"]
    assert Renderer(make_tokenizer()).decode_marked(row).startswith("2+2*3?2*3=6\n⟦2+6=8")


def test_advantages_by_sampling_and_the_policy_that_weighs_by_them():
    """Three steps of two choices; the reward is known. Sampled values are the exact ones, and DPO on pairs of
    a step's choices, preferred as their advantages say, ends at the policy times exp(advantage / beta)."""
    rng = torch.Generator().manual_seed(0)
    reward = torch.rand(2, 2, 2, generator=rng)
    pi = torch.tensor([0.6, 0.4])
    exact = {(): float(torch.einsum("ijk,i,j,k->", reward, pi, pi, pi))}
    exact |= {(i,): float(torch.einsum("jk,j,k->", reward[i], pi, pi)) for i in range(2)}
    draws = (torch.rand(4000, 3, generator=rng) > 0.6).long()

    def sampled(*begun: int) -> float:
        paths = draws.clone()
        for k, step in enumerate(begun):
            paths[:, k] = step
        return float(
            (torch.rand(len(paths), generator=rng) < reward[paths[:, 0], paths[:, 1], paths[:, 2]])
            .float()
            .mean()
        )

    for begun, value in exact.items():
        assert sampled(*begun) == pytest.approx(value, abs=0.05)
    gains = advantages([sampled(), sampled(0)])
    assert gains[0] == pytest.approx(exact[(0,)] - exact[()], abs=0.06)
    beta, advantage = 0.5, torch.tensor([exact[(i,)] - exact[()] for i in range(2)], dtype=torch.float64)
    base = pi.double().log()
    roles = bandit.roles_of(bandit.Arms(base))
    batch = bandit.batch_of(bandit.pulled([[0, 1], [0, 1]], torch.tensor([1.0, 0.0])))
    batch.rows[1]["scores"] = [0.0, 1.0]
    weights = torch.stack(
        [torch.sigmoid(advantage[0] - advantage[1]), torch.sigmoid(advantage[1] - advantage[0])]
    )
    optimizer = torch.optim.LBFGS(
        roles.policy.parameters(), max_iter=60, line_search_fn="strong_wolfe", tolerance_grad=1e-12
    )

    def closure():
        optimizer.zero_grad()
        value = (weights * build("objective", {"name": "dpo", "beta": beta}).loss(roles, batch)).sum()
        value.backward()
        return value

    optimizer.step(closure)
    want = (base + advantage / beta).log_softmax(-1)
    torch.testing.assert_close(roles.policy.log_policy().detach(), want, atol=1e-3, rtol=0)


@pytest.mark.long
def test_pairs_come_from_where_it_goes_wrong(tmp_path):
    """A model that was taught two ways on: from a good first step it may still end right, from a spurious one
    never.
    """
    texts = [("Q", "a\nR"), ("Q", "a\nW"), ("Q", "a\nR"), ("Q", "b\nW")]
    rows = [{"id": str(i), "prompt": p, "completions": [c]} for i, (p, c) in enumerate(texts)]
    net = make_llama()
    net.config._name_or_path = str(tmp_path)
    roles = Roles(
        Policy(build("architecture", "causal"), net, Untuned(net)), Clock(), Renderer(make_tokenizer())
    )
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(60):
        adam.zero_grad()
        build("objective", "sft").loss(roles, roles.batch(rows)).mean().backward()
        adam.step()
    net.eval()
    stage = build(
        "stage",
        {
            "name": "step_pairs",
            "n": 24,
            "max_new_tokens": 6,
            "reward": {"name": "exact_match", "extract": "after", "marker": "\n"},
        },
    )
    wrong = [
        {"id": "w", "prompt": "Q", "completions": ["b\nW"], "answer": "\nR"},
        {"id": "r", "prompt": "Q", "completions": ["a\nR"], "answer": "\nR"},
    ]
    (made,) = stage(wrong, roles)
    assert (
        made["id"] == "w"
        and made["prefix"] == ""
        and made["completions"][1] == "b\nW"
        and made["completions"][0].strip().endswith("R")
    )
    assert made["advantages"][0] == min(made["advantages"]) < 0, "the first step is the pit"
    pair = [made]
    dpo, start = (
        build("objective", {"name": "dpo", "beta": 0.5}),
        {k: v.clone() for k, v in net.state_dict().items()},
    )

    def spurious() -> float:
        batch = roles.batch([{"id": "x", "prompt": "Q", "completions": ["b\nW"]}])
        return float(roles.policy.logprobs(batch)[0].detach().exp())

    before, found = spurious(), {}
    reference = make_llama()
    reference.load_state_dict(start)
    roles.players["reference"] = Policy(
        build("architecture", "causal"), reference, Untuned(reference), "reference", torch.no_grad
    )
    for name, objective, some in (
        ("dpo", dpo, pair),
        ("positives", build("objective", "sft"), [{"id": "p", "prompt": "Q", "completions": ["b\nR"]}]),
    ):
        net.load_state_dict(start)
        adam = torch.optim.Adam(net.parameters(), lr=5e-4)
        for _ in range(5):
            adam.zero_grad()
            objective.loss(roles, roles.batch(some)).mean().backward()
            adam.step()
        found[name] = spurious()
    assert found["dpo"] < before < found["positives"], (
        "a right end excuses a spurious step only where there are no negatives"
    )
