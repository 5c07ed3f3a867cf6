"""multicritique: exactly the good points stay, pairs follow weighted points, disputed pairs leave."""

from __future__ import annotations

import json
import re

from helpers.synthesis import Scripted, nobody
from luthier.methods.stages.synthesize.multicritique import points_in
from luthier.registry import build

ROWS = [{"id": "0", "prompt": "2 + 2?", "completions": ["5, since 2 is 3"]}]


def point(issue: str, severity: str = "minor") -> dict:
    return {"location": "line 1", "issue": issue, "severity": severity, "suggestion": "mend it"}


def critic(*points: dict):
    return Scripted(lambda prompt, seed: f"Here: {json.dumps(points)}")


def judge(*good: str):
    """Calls points with these issues good."""

    def reply(prompt: str, seed: int) -> str:
        listed = re.findall(r"^(\d+)\. (\{.*\})$", prompt, re.M)
        return str([int(number) for number, text in listed if json.loads(text)["issue"] in good])

    return Scripted(reply)


CRITICS = [
    critic(point("wrong sum", "severe"), point("bad tone")),
    critic(point("wrong sum", "severe"), point("wrong premise", "moderate")),
    critic(point("too short")),
]


def stage(*judges, **settings):
    writer = Scripted(lambda prompt, seed: "Right sums. 4.")
    settings = {"writer": writer, "critics": CRITICS, "judges": list(judges), **settings}
    return build("stage", {"name": "multicritique", **settings})


def test_exactly_the_good_points_stay():
    good = ("wrong sum", "wrong premise")
    (row,) = stage(judge(*good))(ROWS, nobody())
    points = points_in(row["completions"][0])
    assert points == [point("wrong sum", "severe"), point("wrong premise", "moderate")]
    assert row["criteria"] == "Right sums. 4." and "5, since" in row["prompt"]
    (row,) = stage(judge(*good), judge("wrong sum"), judge("bad tone"))(ROWS, nobody())
    assert [each["issue"] for each in points_in(row["completions"][0])] == ["wrong sum"]
    assert points_in("no list") is None and points_in("[1]") is None and points_in("[]") == []


def test_pairs_follow_the_weighted_points():
    """3 - 1 - 2 = 0, 3 + 2 = 5 and -1 - 5 = -6."""
    (row,) = stage(judge("wrong sum", "wrong premise"), give="pairs")(ROWS, nobody())
    assert row["scores"] == [5.0, -6.0] and row["agreement"] == 1.0
    assert "wrong premise" in row["completions"][0] and "too short" in row["completions"][1]
    roles = nobody()
    same = [critic(point("a")), critic(point("a"))]
    assert not list(stage(judge("a"), give="pairs", critics=same)(ROWS, roles))
    assert "1 has critiques that are equally good" in roles.sentences[-1] and "0" in roles.dropped


def test_disputed_pairs_leave():
    """Two of five judges would order the pair the other way round."""
    right, other = judge("wrong sum", "wrong premise"), judge("too short")
    judges = [right] * 3 + [other] * 2
    assert list(stage(*judges, give="pairs", agreement=0.6)(ROWS, nobody()))[0]["agreement"] == 0.6
    roles = nobody()
    assert not list(stage(*judges, give="pairs", agreement=0.7)(ROWS, roles))
    assert "1 has judges that disagree" in roles.sentences[-1]
