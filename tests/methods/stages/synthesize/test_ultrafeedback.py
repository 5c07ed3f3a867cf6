"""ultrafeedback: the chosen is rated higher, ratings stay with their answers, a judge's reply is read."""

from __future__ import annotations

import re

import pytest

from helpers.synthesis import Scripted, nobody
from luthier.methods.stages.synthesize.ultrafeedback import judgements
from luthier.registry import build

ROWS = [{"id": str(k), "prompt": f"task {k}"} for k in range(12)]


def writer(name: str):
    made = Scripted(lambda prompt, seed: f"{name} writes {seed % 5 + 1}")
    made.name = name
    return made


def rate(prompt: str, seed: int) -> str:
    """The number that an answer ends with."""
    lines = []
    for number, text in re.findall(r"Answer (\d+):\n(.*)", prompt):
        lines.append(f"Rating {number}: {text[-1]}\nRationale {number}: it ends with {text[-1]}.")
    return "\n".join(lines)


def stage(**settings):
    settings = {"writers": [writer("a"), writer("b")], "judge": Scripted(rate), **settings}
    return build("stage", {"name": "ultrafeedback", "writer": writer("c"), **settings})


def test_the_chosen_is_rated_higher_and_ties_leave():
    roles = nobody()
    out = list(stage(n=3)(ROWS, roles))
    assert out and len({row["id"] for row in out}) == len(out)
    assert all(row["scores"][0] > row["scores"][1] and len(row["completions"]) == 2 for row in out)
    assert len({row["preference"] for row in out}) > 1 and {row["id"] for row in out} | {*roles.dropped} == {
        row["id"] for row in ROWS
    }
    alike = Scripted(lambda prompt, seed: "\n".join(f"Rating {k}: 3" for k in (1, 2, 3)))
    roles = nobody()
    assert not list(stage(n=3, judge=alike)(ROWS, roles)) and len(roles.dropped) == len(ROWS)
    assert "12 has ratings that are all alike" in roles.sentences[-1]


def test_ratings_stay_with_their_answers_in_any_order():
    for row in stage(give="all")(ROWS, nobody()):
        assert [float(text[-1]) for text in row["completions"]] == row["scores"]
        assert [text[0] for text in row["completions"]] == row["writers"] and {*row["writers"]} == {"a", "b"}
        ends = [why[-2] for why in row["rationales"]]
        assert ends == [text[-1] for text in row["completions"]]
        assert row["provenance"]["judge"] == "scripted"


@pytest.mark.parametrize(
    "text",
    [
        "Rating 1: 4\nRationale 1: fine\nRating 2: 2\nRationale 2: slow\nand long",
        "**Rating 1:** 4\n**Rationale 1:** fine\n\n**Rating 2:** 2/5\n**Rationale 2:** slow\nand long",
        "rating #1: 4\nrationale #1: fine\nrating #2: 2\nrationale #2: slow\nand long",
        "Rating 2: 2\nRationale 2: slow\nand long\n\nRating 1: 4.0\nRationale 1: fine",
    ],
)
def test_ratings_and_rationales_are_read(text):
    assert judgements(text) == {1: (4.0, "fine"), 2: (2.0, "slow\nand long")}
    assert judgements("no ratings") == {} and judgements("Rating 1: 9") == {}
