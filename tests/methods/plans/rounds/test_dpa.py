"""dpa: the best answer in a direction, and a policy whose answers follow the direction."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.plans import played, report
from helpers.rounds import scripted
from luthier.clock import Clock
from luthier.methods.stages.rollout.draw_direction import directed
from luthier.registry import build

LETTERS = {"name": "regex", "pattern": "a"}
LENGTH = {"name": "length", "of": "characters", "scale": 0.25}
PLAN = {"name": "dpa", "rewards": [LETTERS, LENGTH], "names": ["letters", "length"], "n": 8}
ANSWERS = ["a", "ab", "abb", "abbb", "b", "bb", "bbb", "bbbb"]


def test_directions_have_length_one_and_stand_in_the_prompt():
    stage = build("stage", {"name": "draw_direction", "names": ["x", "y"], "degrees": 45.0})
    roles = scripted(lambda prompt, seed: "a")
    rows = list(stage([{"id": str(k), "prompt": "ask"} for k in range(200)], roles))
    angles = []
    for row in rows:
        x, y = row["weights"]
        assert math.hypot(x, y) == pytest.approx(1)
        assert row["prompt"] == f"Maximize weighted rating = x*{round(100 * x)} + y*{round(100 * y)}\nask"
        angles.append(math.degrees(math.atan2(y, x)))
    assert max(map(abs, angles)) <= 45 and min(angles) < -30 and max(angles) > 30
    roles.clock = Clock(1)
    assert [row["weights"] for row in stage([{"id": "0", "prompt": "ask"}], roles)] != [rows[0]["weights"]]
    turns = [{"role": "user", "content": "ask"}]
    assert directed(turns, ("x", "y"), [0.8, -0.6])[0]["content"].endswith("x*80 + y*-60")
    three = build("stage", {"name": "draw_direction", "names": ["x", "y", "z"]})
    (row,) = three([{"id": "0", "prompt": "ask"}], roles)
    assert math.hypot(*row["weights"]) == pytest.approx(1) and row["weights"][0] >= math.cos(math.pi / 4)
    with pytest.raises(ValueError, match="direction"):
        build("stage", {"name": "draw_direction", "direction": [0.0, 0.0]})


def chosen(plan: dict, rows: list[dict], reply, number: int = 0) -> list[dict]:
    """What a round of the plan trains on."""
    made, roles = build("plan", plan), scripted(reply)
    for stage in [*made.sample(number), *made.select(number)]:
        rows = list(build("stage", stage)(rows, roles))
    return [{**row, "text": roles.text(row["completions"][0])} for row in rows]


def test_the_best_is_the_argmax_of_the_inner_product():
    prompts = [{"id": str(k), "prompt": f"{k}:"} for k in range(20)]
    best = chosen({**PLAN, "degrees": 90.0}, prompts, lambda prompt, seed: ANSWERS[seed % 8])
    answers = set()
    for row in best:
        value = [sum(w * r for w, r in zip(row["weights"], both(text), strict=True)) for text in ANSWERS]
        assert row["scores"][0] == pytest.approx(max(value))
        assert value[ANSWERS.index(row["text"])] == pytest.approx(max(value))
        answers.add(row["text"])
    assert answers == {"a", "abbb"} or len(answers) > 1


def both(text: str) -> tuple[float, float]:
    return float("a" in text), 0.25 * len(text)


def test_the_first_axis_alone_is_plain_rejection_sampling():
    prompts = [{"id": str(k), "prompt": f"{k}:"} for k in range(6)]
    reply = lambda prompt, seed: ANSWERS[seed % 8]
    best = chosen({**PLAN, "degrees": 0.0}, prompts, reply)
    roles = scripted(reply)
    plain = build("stage", {"name": "rollout", "n": 8})(prompts, roles)
    scored = list(build("stage", {"name": "score", "reward": LETTERS})(plain, roles))
    plain = build("stage", "best")(scored, roles)
    assert [row["text"] for row in best] == [roles.text(row["completions"][0]) for row in plain]
    assert [row["scores"] for row in best] == [row["scores"] for row in plain]


@pytest.mark.long
def test_length_follows_the_direction_after_two_rounds():
    """A policy of two numbers, logits of lengths = b + w * (the second component), fitted to what each round
    chooses.
    """
    lengths = torch.arange(1, 5).float()
    weight = torch.zeros(2, 4, requires_grad=True)

    def logits(prompt: str) -> torch.Tensor:
        second = float(prompt.split("length*")[1].split("\n")[0]) / 100
        return weight[0] + second * weight[1]

    def reply(prompt: str, seed: int) -> str:
        rng = torch.Generator().manual_seed(seed)
        place = int(torch.multinomial(logits(prompt).detach().softmax(-1), 1, generator=rng))
        return "a" + "b" * place

    prompts = [{"id": str(k), "prompt": f"{k}:"} for k in range(60)]
    for number in range(2):
        rows = chosen({**PLAN, "n": 3}, prompts, reply, number)
        adam = torch.optim.Adam([weight], lr=0.2)
        for _ in range(40):
            adam.zero_grad()
            losses = [-logits(r["prompt"]).log_softmax(-1)[len(r["text"]) - 1] for r in rows]
            torch.stack(losses).mean().backward()
            adam.step()
    means = []
    for angle in (-40, -20, 0, 20, 40):
        prompt = directed("?", ("letters", "length"), [1.0, math.sin(math.radians(angle))])
        means.append(float(logits(prompt).detach().softmax(-1) @ lengths))
    assert all(a < b for a, b in zip(means, means[1:], strict=False)) and means[-1] > means[0] + 1, means


def test_rounds_go_on_from_each_other(recipe):
    asked, _ = played(PLAN, recipe, [report("one"), report("two")])
    assert [request.stages[0]["draw"] for request in asked] == [0, 1]
    assert asked[1].init_from == "one" and asked[0].objective == "sft"
    with pytest.raises(ValueError, match="name of its own"):
        build("plan", {"name": "dpa", "rewards": ["length", "length"]})
