"""sasr: the share of the gradients' norms, steps as often as it says, and both losses."""

from __future__ import annotations

import json
import math

import pytest
import torch

import luthier
from helpers.objectives import cast, loss_of, make_rows
from luthier.clock import Clock
from luthier.methods.roles.averages.supervised_share import Norms
from luthier.methods.stages.rollout.sasr import is_supervised


class Tuned:
    """Something with one parameter and its gradient."""

    def __init__(self, *gradient: float):
        self.p = torch.nn.Parameter(torch.zeros(len(gradient)))
        self.p.grad = torch.tensor(gradient)

    def parameters(self):
        return {"p": self.p}


def test_the_share_is_that_of_the_norms():
    tuned = Tuned(3.0, 4.0)
    norms, clock = Norms(tuned, gamma=2.0, warmup=1), Clock()
    norms.supervised.fill_(1.0)
    assert norms.share(0) == 1.0
    norms.after_step(clock)
    assert norms.share(1) == pytest.approx(1 / 3)
    clock.step, tuned.p.grad = 1, torch.tensor([0.0, 1.0])
    norms.after_step(clock)
    assert norms.share(2) == pytest.approx(1 / (1 + 10))
    norms.supervised.fill_(0.0)
    tuned.p.grad = torch.tensor([9.0, 9.0])
    norms.after_step(clock)
    assert norms.share(2) == pytest.approx(1 / 11), "steps of reinforcement tell nothing"
    for gamma, share in ((0.0, 1.0), (math.inf, 0.0)):
        norms.gamma = gamma
        assert norms.share(2) == share


def test_steps_are_chosen_as_often_as_their_share_says():
    clock, count, expected, variance = Clock(), 0, 0.0, 0.0
    for clock.step in range(500):
        share = 0.9 - 0.0015 * clock.step
        count += is_supervised(clock, share)
        expected += share
        variance += share * (1 - share)
    assert abs(count - expected) < 3 * variance**0.5


def test_a_step_is_sfts_or_grpos():
    rows, roles = make_rows(2, k=3), cast()
    for row in rows:
        row["demonstration"] = False
    grpo = loss_of({"name": "grpo", "beta": 0.1}, roles, rows)
    assert torch.equal(loss_of({"name": "sasr", "beta": 0.1}, roles, rows), grpo)
    rows[0]["demonstration"] = True
    mixed = loss_of({"name": "sasr", "beta": 0.1}, roles, rows)
    assert torch.equal(mixed[3:], grpo[3:])
    sft = loss_of("sft", roles, rows[:1]).split([len(c) for c in rows[0]["completions"]])
    torch.testing.assert_close(mixed[:3], torch.stack([part.mean() for part in sft]))


@pytest.mark.long
@pytest.mark.parametrize("gamma, share", [(0.0, 1.0), (math.inf, 0.0)], ids=["sft", "grpo"])
def test_gamma_leads_from_sft_to_grpo(tmp_path, gamma, share):
    recipe = {
        "model": "toy:lm-small",
        "data": {"path": "toy:arithmetic/train", "n": 16},
        "objective": {"name": "sasr", "beta": 0.0},
        "roles": {"supervised_share": {"name": "supervised_share", "warmup": 2, "gamma": gamma}},
        "online_stages": [{"name": "sasr", "n": 2, "max_new_tokens": 4, "reward": "length"}],
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "logging_steps": 1,
        "evaluate": [],
        "eval_data": 0,
    }
    luthier.tune(recipe, folder=tmp_path / "run")
    text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if "supervised" in line]
    assert [line["supervised"] for line in lines] == [1.0, 1.0] + [share] * 3
    assert [line["supervised_share"] for line in lines] == [1.0, 1.0] + [share] * 3
