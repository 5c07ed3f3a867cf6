"""MultiCritique: several models criticise an answer, a judge classifies every point they make, and the good
points become one critique to learn from, or two critiques become a pair.

For each row the writer adds what a critic needs: criteria and a reference answer. Each critic writes a list
of points (location, issue, severity, suggestion). Each judge marks every point of all critics good or flawed.
With `give: critiques` the points that most judges call good are one critique, as JSON (for SFT); with `pairs`
each critic's critique scores the weight of its good points less that of its flawed ones and of good points of
others that it misses, the best and the worst are a pair, and pairs on whose order less than `agreement` of
the judges agree leave (Lan et al., 2024). Departs: what the paper scores in several levels of quality is good
or flawed here.
"""

from __future__ import annotations

import json
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS
from luthier.methods.stages._base import text_of
from luthier.methods.stages.select._embedding import question
from luthier.methods.stages.synthesize._synthesis import Author, Synthesis, json_in
from luthier.registry import stage

KEYS = ("location", "issue", "severity", "suggestion")
WEIGHTS = {"minor": 1.0, "moderate": 2.0, "severe": 3.0}
INFORMATION = (
    "Say in two paragraphs by which criteria an answer to this task should be judged, and give a reference"
    " answer.\n\nTask:\n{task}"
)
CRITIQUE = (
    "Criticise the answer. Reply with a JSON list of objects with the keys location, issue, severity (minor,"
    " moderate or severe) and suggestion; [] where nothing is wrong.\n\nTask:\n{task}\n\nAnswer:\n{answer}"
)
BESIDE = "\n\nCriteria and reference:\n{information}"
META = (
    "Several critics looked at an answer. Which of their points are right and useful? Reply with a JSON list"
    " of the numbers of these.\n\nTask:\n{task}\n\nAnswer:\n{answer}\n\nPoints:\n{points}"
)


@stage(
    example={"max_new_tokens": 4},
    paper="arXiv:2410.15287",
    row="multicritique",
    requires=[COMPLETIONS, GENERATE],
    provides=[COMPLETIONS],
    use_when="a model is to learn to criticise answers, and several models can, none of them reliably.",
    costs="for each row one reply, one of every critic and one of every judge.",
    covers="criteria and reference, points of several critics, classification by several judges, aggregation,"
    " pairs by weighted points with agreement.",
    omits="the reward model and PPO on the pairs: objectives `reward` and `ppo`; CriticEval and CriticBench.",
    contract={"gives": "a tiny model writes no JSON"},
    tests=[
        "methods/stages/synthesize/test_multicritique.py::test_exactly_the_good_points_stay",
        "methods/stages/synthesize/test_multicritique.py::test_pairs_follow_the_weighted_points",
        "methods/stages/synthesize/test_multicritique.py::test_disputed_pairs_leave",
    ],
)
class MultiCritique(Synthesis):
    """prompt = task and answer, completion(s) = critiques as JSON. Columns `criteria`, `agreement`."""

    critics: list[Any] = field(default_factory=list)  # who criticises, as `writer`; empty: `writer` alone
    judges: list[Any] = field(default_factory=list)  # who classifies points; empty: `writer` alone
    give: Literal["critiques", "pairs"] = "critiques"  # one critique a row, or a better and a worse one
    agreement: Annotated[float, Field(ge=0, le=1)] = 0.6  # share of judges that must order a pair alike
    # severity -> what a point weighs
    weights: dict[str, float] = field(default_factory=WEIGHTS.copy)

    @property
    def active_provides(self):
        return self.provides | {PAIRS, "scores"} if self.give == "pairs" else self.provides

    def __call__(self, rows, roles):
        rows = [row for row in rows if row.get("completions")]
        author = self.author(roles)
        critics = [self.author(roles, who) for who in self.critics] or [author]
        judges = [self.author(roles, who) for who in self.judges] or [author]
        out = []
        for row in rows:
            task, answer = question(row), text_of(roles, row["completions"][0])
            (information,) = author.ask([INFORMATION.replace("{task}", task)], [f"{row['id']} criteria"], 0.0)
            prompt = CRITIQUE.replace("{task}", task).replace("{answer}", answer)
            critiques = []
            for number, critic in enumerate(critics):
                beside = prompt + BESIDE.replace("{information}", information.strip())
                (reply,) = critic.ask([beside], [f"{row['id']} critique {number}"])
                points = points_in(reply)
                if points is None:
                    author.reject(row["id"], reply, "is no list of points")
                else:
                    critiques.append((critic, points))
            every = [point for _, points in critiques for point in points]
            votes = [self.good(author, judge, task, answer, every) for judge in judges]
            new = self.critique(author, row, prompt, every, votes)
            if self.give == "pairs":
                new = self.pair(author, row, prompt, critiques, votes)
            if new is not None:
                new["criteria"] = information.strip()
                new["provenance"]["critics"] = [critic.speaker.name for critic, _ in critiques]
                out.append(new)
        return author.finish(rows, out, "its critiques were not usable")

    def good(self, author: Author, judge: Author, task: str, answer: str, points: list[dict]) -> set[int]:
        """Places of the points that a judge calls good."""
        if not points:
            return set()
        listed = "\n".join(f"{k + 1}. {json.dumps(point)}" for k, point in enumerate(points))
        prompt = META.replace("{task}", task).replace("{answer}", answer).replace("{points}", listed)
        (reply,) = judge.ask([prompt], ["judge"], 0.0)
        numbers = json_in(reply)
        if not isinstance(numbers, list):
            author.reject("", reply, "is no list of numbers")
            return set()
        return {n - 1 for n in numbers if isinstance(n, int) and 1 <= n <= len(points)}

    def critique(
        self, author: Author, row: dict, prompt: str, points: list[dict], votes: list[set[int]]
    ) -> dict | None:
        """The points that most judges call good, each once."""
        chosen: list[dict] = []
        for place, point in enumerate(points):
            good = 2 * sum(place in vote for vote in votes) > len(votes)
            if good and point not in chosen:
                chosen.append(point)
        if points and not chosen:
            author.reject(row["id"], json.dumps(points), "has no good point")
            return None
        return author.row(row, "critique", prompt, json.dumps(chosen))

    def pair(
        self,
        author: Author,
        row: dict,
        prompt: str,
        critiques: list[tuple[Author, list[dict]]],
        votes: list[set[int]],
    ) -> dict | None:
        """The critiques with the highest and the lowest mean score over judges."""
        by_judge = [self.scores([points for _, points in critiques], good) for good in votes]
        means = [sum(scores) / len(votes) for scores in zip(*by_judge, strict=True)]
        if len({*means}) < 2:
            author.reject(row["id"], str(means), "has critiques that are equally good")
            return None
        best = max(range(len(means)), key=means.__getitem__)
        worst = min(range(len(means)), key=means.__getitem__)
        agreement = sum(scores[best] > scores[worst] for scores in by_judge) / len(by_judge)
        if agreement < self.agreement:
            author.reject(row["id"], str(by_judge), "has judges that disagree")
            return None
        texts = [json.dumps(critiques[place][1]) for place in (best, worst)]
        new = author.row(row, "critique", prompt, texts[0], scores=[means[best], means[worst]])
        turns = not isinstance(row["prompt"], str)
        worse: Any = [{"role": "assistant", "content": texts[1]}] if turns else texts[1]
        return {**new, "completions": [*new["completions"], worse], "agreement": agreement}

    def scores(self, critiques: list[list[dict]], good: set[int]) -> list[float]:
        """Of each critique: its good points, less its flawed ones and the good ones of others it lacks."""
        every = [point for points in critiques for point in points]
        right = [point for place, point in enumerate(every) if place in good]
        out, first = [], 0
        for points in critiques:
            total = 0.0
            for k, point in enumerate(points):
                total += self.weight(point) if first + k in good else -self.weight(point)
            issues = {point["issue"] for point in points}
            missed = {point["issue"]: self.weight(point) for point in right if point["issue"] not in issues}
            out.append(total - sum(missed.values()))
            first += len(points)
        return out

    def weight(self, point: dict) -> float:
        return self.weights.get(point["severity"], 1.0)


def points_in(text: str) -> list[dict] | None:
    """The points of a critique, each with all keys as text; None where there is no such list."""
    parsed = json_in(text)
    if not isinstance(parsed, list):
        return None
    points = []
    for point in parsed:
        if not isinstance(point, dict) or not isinstance(point.get("issue"), str):
            return None
        points.append({key: str(point.get(key, "")) for key in KEYS})
    return points
