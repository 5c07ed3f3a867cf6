"""UltraFeedback for any preferences: several models answer under drawn principles, a judge rates all answers
of a prompt at once by a rubric, and the best becomes a pair with a lower one.

Each prompt is tied to one preference with its rubric; CodeUltraFeedback's five are the default. Each answer
comes from one of `writers`, drawn, with a principle of the preference before the prompt. The judge sees the
answers in a drawn order and gives each a rating from 1 to 5 and a rationale (Weyssow et al., 2024). Pairs:
the best rated against one drawn from those rated lower; prompts whose ratings are all alike leave.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import without
from luthier.methods.stages.select._embedding import question
from luthier.methods.stages.synthesize._synthesis import Author, Synthesis
from luthier.registry import stage

# preference -> what the judge looks at; each line is a principle that an answer may be asked to follow
RUBRICS = {
    "instruction following": "Do what was asked, all of it.\nKeep to every constraint.\nAdd nothing unasked.",
    "code explanation": "Explain the code step by step.\nSay why it is right.\nMake comments useful.",
    "code complexity and efficiency": "Use the least time.\nUse little memory.\nAvoid needless work.",
    "code readability": "Choose telling names.\nKeep functions short.\nLay the code out clearly.",
    "coding style": "Follow the language's conventions.\nUse its idioms.\nHandle errors as is customary.",
}
ANSWER = "{principle}\n\n{instruction}"
JUDGE = (
    "Rate each answer to an instruction for {preference}, from 1 (worst) to 5 (best). What"
    " counts:\n{rubric}\n\nWrite for each answer two lines:\nRating N: R\nRationale N:"
    " why\n\nInstruction:\n{instruction}\n\n{answers}"
)
RATING = re.compile(r"^\W*Rating\s*#?(\d+)\W*:\W*([1-5](?:\.\d+)?)\b", re.M | re.I)
RATIONALE = re.compile(
    r"^\W*Rationale\s*#?(\d+)\W*:[ *]*(.*?)\s*(?=^\W*(?:Rating|Rationale)\s*#?\d+\W*:|\Z)", re.M | re.I | re.S
)


@stage(
    example={"n": 2, "max_new_tokens": 4},
    paper="arXiv:2403.09032",
    row="codeultrafeedback",
    requires=[GENERATE],
    provides=[COMPLETIONS, SCORES, PAIRS],
    use_when="prompts are at hand, preferences are not, and a judge can say which of several answers is"
    " better.",
    costs="`n` answers and one judgement for each prompt.",
    covers="preferences with rubrics, principles, several writers, one judgement of all answers in a drawn"
    " order, pairs of the best and a drawn lower one; for other preferences name `rubrics`.",
    omits="CODAL-Bench, grading against a reference answer, and the tuned model's gain by preference.",
    contract={"gives": "a tiny model rates nothing"},
    tests=[
        "methods/stages/synthesize/test_ultrafeedback.py::test_the_chosen_is_rated_higher_and_ties_leave",
        "methods/stages/synthesize/test_ultrafeedback.py::test_ratings_stay_with_their_answers_in_any_order",
        "methods/stages/synthesize/test_ultrafeedback.py::test_ratings_and_rationales_are_read",
    ],
)
class UltraFeedback(Synthesis):
    """completions and scores, a pair or all `n`. Columns `preference`, `rationales`, `writers`."""

    writers: list[Any] = field(default_factory=list)  # who answers, as `writer`; empty: `writer` alone
    judge: Any = None  # who rates, as `writer`; null: `writer`
    n: Annotated[int, Field(ge=2)] = 4  # answers to each prompt
    # preference -> principles, one a line, which are the judge's rubric as well
    rubrics: dict[str, str] = field(default_factory=RUBRICS.copy)
    give: str = "pairs"  # pairs, or all: every answer with its rating

    def __post_init__(self):
        if self.give not in ("pairs", "all"):
            raise ValueError("give: pairs or all")

    def __call__(self, rows, roles):
        rows = list(rows)
        authors = [self.author(roles, who) for who in self.writers] or [self.author(roles)]
        judge = self.author(roles, self.judge)
        out = []
        for row in rows:
            preference = self.drawn(roles, row, "preference", list(self.rubrics))
            answers, names = self.answers(roles, authors, row, preference)
            ratings, rationales = self.rated(judge, row, preference, answers)
            if not all(ratings):
                judge.reject(row["id"], str(ratings), "has a rating that cannot be read")
                continue
            places = list(range(self.n))
            if self.give == "pairs":
                places = self.pair(roles, row, ratings)
                if not places:
                    judge.reject(row["id"], str(ratings), "has ratings that are all alike")
                    continue
            turns = not isinstance(row["prompt"], str)
            completions = []
            for place in places:
                text = answers[place]
                completions.append([{"role": "assistant", "content": text}] if turns else text)
            new = {**without(row), "completions": completions, "preference": preference}
            new["scores"] = [float(ratings[place]) for place in places]
            new["rationales"] = [rationales[place] for place in places]
            new["writers"] = [names[place] for place in places]
            new["provenance"] = {"stage": self.name, "sources": [str(row["id"])], "writer": new["writers"]}
            new["provenance"]["judge"] = judge.speaker.name
            if self.licence:
                new["provenance"]["licence"] = self.licence
            out.append(new)
        return judge.finish(rows, out, "its answers were not rated, or alike")

    def drawn(self, roles: Any, row: dict, what: str, options: list, number: int = 0) -> Any:
        rng = roles.clock.rng(self.name, row["id"], what, number, at=0)
        return options[int(torch.randint(len(options), (1,), generator=rng))]

    def answers(
        self, roles: Any, authors: list[Author], row: dict, preference: str
    ) -> tuple[list[str], list[str]]:
        """`n` answers, and who wrote each: writers in a drawn order, none twice before all have written."""
        texts, names = [], []
        rng = roles.clock.rng(self.name, row["id"], "writers", at=0)
        order = torch.randperm(len(authors), generator=rng).tolist()
        for k in range(self.n):
            author = authors[order[k % len(order)]]
            principle = self.drawn(roles, row, "principle", self.rubrics[preference].splitlines(), k)
            prompt = ANSWER.replace("{principle}", principle).replace("{instruction}", question(row))
            (reply,) = author.ask([prompt], [f"{row['id']} answer {k}"])
            texts.append(reply.strip())
            names.append(author.speaker.name)
        return texts, names

    def rated(
        self, judge: Author, row: dict, preference: str, answers: list[str]
    ) -> tuple[list[float], list[str]]:
        """Rating (0: none) and rationale of each answer; the judge sees them in a drawn order."""
        rng = judge.roles.clock.rng(self.name, row["id"], "order", at=0)
        order = torch.randperm(len(answers), generator=rng).tolist()
        listed = "\n\n".join(f"Answer {k + 1}:\n{answers[place]}" for k, place in enumerate(order))
        prompt = JUDGE.replace("{preference}", preference).replace("{rubric}", self.rubrics[preference])
        prompt = prompt.replace("{instruction}", question(row)).replace("{answers}", listed)
        (reply,) = judge.ask([prompt], ["judge"], 0.0)
        ratings, rationales = [0.0] * len(answers), [""] * len(answers)
        for number, (rating, rationale) in judgements(reply).items():
            if 1 <= number <= len(order):
                ratings[order[number - 1]] = rating
                rationales[order[number - 1]] = rationale
        return ratings, rationales

    def pair(self, roles: Any, row: dict, ratings: list[float]) -> list[int]:
        """Places of the best and of one that is rated lower; none where all are alike."""
        best = max(range(len(ratings)), key=ratings.__getitem__)
        lower = [place for place, rating in enumerate(ratings) if rating < ratings[best]]
        return [best, self.drawn(roles, row, "lower", lower)] if lower else []


def judgements(text: str) -> dict[int, tuple[float, str]]:
    """Number of an answer -> its rating and rationale."""
    rationales = {int(number): why.strip() for number, why in RATIONALE.findall(text)}
    out = {}
    for number, rating in RATING.findall(text):
        out[int(number)] = (float(rating), rationales.get(int(number), ""))
    return out
