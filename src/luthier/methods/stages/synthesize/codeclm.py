"""CodecLM: instructions tailored to the use case and the skills of seeds, made harder until a strong model
answers them clearly better than the target.

Encode: the writer says of each seed a use case and its skills. Decode: from these it writes basic
instructions. Self-rubrics: from the same it writes what makes such instructions complex, and actions that
raise it; one drawn action rewrites an instruction. Contrastive filter: writer and policy both answer, and the
writer scores both in both orders; where scores differ by more than `gap` the better answer becomes a row,
else the instruction is rewritten, `iterations` times at most (Wang et al., 2024).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages.select._embedding import question
from luthier.methods.stages.synthesize._synthesis import Author, PolicySpeaker, Synthesis, items, json_in
from luthier.registry import stage

METADATA = (
    "Which use case does this instruction belong to, and which skills does its answer take? Reply with JSON:"
    ' {"use_case": "...", "skills": ["...", "..."]}\n\n{instruction}'
)
BASIC = (
    "Write {n} instructions for the use case {use_case} whose answers take these skills: {skills}. One a"
    " line, numbered."
)
ACTIONS = (
    "What makes instructions for the use case {use_case} with the skills {skills} hard to answer? Think of"
    " rubrics, and list an action for each that makes an instruction harder, one a line, numbered."
)
REWRITE = "Rewrite this instruction. {action}\nWrite the new instruction alone.\n\n{instruction}"
JUDGE = (
    "Two answers to an instruction. Give each a score from 1 (worst) to 10 (best), in two lines:\nScore A: N"
    "\nScore B: N\n\nInstruction:\n{instruction}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}"
)
SCORE = re.compile(r"Score ([AB]):\s*(\d+(?:\.\d+)?)")


@dataclass
class Draft:
    """An instruction on its way."""

    source: dict
    number: int
    use_case: str
    skills: list[str]
    text: str


@stage(
    paper="arXiv:2404.05875",
    row="codeclm",
    requires=[GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="a strong model may write for a weaker one, and a few instructions show what it is for.",
    costs="for each seed two replies, and for each instruction and iteration two answers and two judgements.",
    covers="use case and skills, basic instructions, self-rubrics with one drawn action a step, the gap of"
    " scores in both orders, the better answer.",
    omits="a judge other than the writer; with `writer: null` the model that is tuned writes for itself, and"
    " no gap of two models is measured.",
    contract={"gives": "a tiny model writes no metadata"},
    tests=[
        "methods/stages/synthesize/test_codeclm.py::test_easy_instructions_are_rewritten_and_hard_ones_stay",
        "methods/stages/synthesize/test_codeclm.py::test_the_order_of_answers_does_not_matter",
        "methods/stages/synthesize/test_codeclm.py::test_no_more_than_so_many_iterations",
    ],
)
class CodecLM(Synthesis):
    """New rows; columns `use_case`, `skills`, `gap`, `provenance`."""

    per_seed: Annotated[int, Field(ge=1)] = 4  # instructions for each seed
    iterations: Annotated[int, Field(ge=0)] = 4  # rewritings of an instruction at most
    gap: Annotated[float, Field(ge=0)] = 3.0  # of scores from 1 to 10, beyond which a row stays

    def __call__(self, rows, roles):
        rows = list(rows)
        author = self.author(roles)
        target = self.author(roles) if self.writer is None else Author(self, roles, PolicySpeaker(roles))
        drafts = self.drafts(author, rows)
        out = []
        for iteration in range(self.iterations + 1):
            gaps = self.judged(author, target, drafts, iteration)
            left = []
            for draft, (gap, strong, weak) in zip(drafts, gaps, strict=True):
                if gap is None or abs(gap) <= self.gap:
                    left.append(draft)
                    continue
                columns = {"use_case": draft.use_case, "skills": draft.skills, "gap": gap}
                answer = strong if gap > 0 else weak
                row = author.row(draft.source, draft.number, draft.text, answer, **columns)
                row["provenance"]["answer"] = (author if gap > 0 else target).speaker.name
                out.append(row)
            drafts = left
            if iteration < self.iterations:
                self.rewrite(author, drafts, iteration)
        for draft in drafts:
            author.reject(draft.source["id"], draft.text, "both models answer alike")
        return author.finish(rows, out, "both models answer all of its instructions alike")

    def drafts(self, author: Author, rows: list[dict]) -> list[Draft]:
        """Basic instructions; rows with columns `use_case` and `skills` are not encoded."""
        new = [row for row in rows if "use_case" not in row]
        prompts = [METADATA.replace("{instruction}", question(row)) for row in new]
        replies = author.ask(prompts, [row["id"] for row in new], 0.0)
        encoded = {row["id"]: json_in(reply) for row, reply in zip(new, replies, strict=True)}
        drafts = []
        for row in rows:
            metadata = encoded.get(row["id"], row)
            use_case, skills = (metadata or {}).get("use_case"), (metadata or {}).get("skills")
            if not isinstance(use_case, str) or not isinstance(skills, list):
                author.reject(row["id"], question(row), "has no use case and skills")
                continue
            names = [str(skill) for skill in skills]
            prompt = filled(BASIC, use_case, names).replace("{n}", str(self.per_seed))
            (reply,) = author.ask([prompt], [row["id"]])
            for number, text in enumerate(items(reply)[: self.per_seed]):
                drafts.append(Draft(row, number, use_case, names, text))
        return drafts

    def judged(
        self, author: Author, target: Author, drafts: list[Draft], iteration: int
    ) -> list[tuple[float | None, str, str]]:
        """Of each draft the gap, the writer's answer and the policy's."""
        texts = [draft.text for draft in drafts]
        keys = [f"{draft.source['id']} {draft.number} {iteration}" for draft in drafts]
        strong, weak = author.ask(texts, keys), target.ask(texts, keys)
        out = []
        for text, one, other in zip(texts, strong, weak, strict=True):
            out.append((self.difference(author, text, one, other), one, other))
        return out

    def difference(self, author: Author, instruction: str, one: str, other: str) -> float | None:
        """The score of one answer minus the other's, the mean of both orders; None where none is readable."""
        gaps = []
        for a, b, sign in ((one, other, 1), (other, one, -1)):
            prompt = JUDGE.replace("{instruction}", instruction).replace("{a}", a).replace("{b}", b)
            (reply,) = author.ask([prompt], ["judge"], 0.0)
            scores = {name: float(value) for name, value in SCORE.findall(reply)}
            if len(scores) == 2:
                gaps.append(sign * (scores["A"] - scores["B"]))
        return sum(gaps) / 2 if len(gaps) == 2 else None

    def rewrite(self, author: Author, drafts: list[Draft], iteration: int) -> None:
        """One drawn action on each instruction."""
        prompts, keys = [], []
        for draft in drafts:
            key = f"{draft.source['id']} {draft.number} rewrite {iteration}"
            (reply,) = author.ask([filled(ACTIONS, draft.use_case, draft.skills)], ["actions"], 0.0)
            actions = items(reply) or ["Make it harder."]
            rng = author.roles.clock.rng(self.name, key, at=0)
            action = actions[int(torch.randint(len(actions), (1,), generator=rng))]
            prompts.append(REWRITE.replace("{action}", action).replace("{instruction}", draft.text))
            keys.append(key)
        for draft, reply in zip(drafts, author.ask(prompts, keys), strict=True):
            draft.text = reply.strip() or draft.text


def filled(template: str, use_case: str, skills: list[str]) -> str:
    return template.replace("{use_case}", use_case).replace("{skills}", ", ".join(skills))
