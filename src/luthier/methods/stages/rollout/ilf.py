"""Imitation learning from language feedback (ILF): the model refines an answer as its feedback says, and
learns the refinement that uses the feedback best.

A row has an answer and what somebody says about it (column `feedback`). Of `n` refinements the one is taken
of which the model says most surely that it incorporates the feedback: the mean probability of yes over
several wordings of that question (the paper's InstructRM ensemble). The target is the refinement without
answer and feedback before it. With `n: 1` this is supervised tuning on refinements. For a next round, gather
feedback on the tuned model's answers and begin from its run.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE, LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.rewards.judges._judge import plain
from luthier.methods.stages._base import (
    CACHED_LOGPROBS,
    OLD_LOGPROBS,
    Stage,
    completion_logprobs,
    pick,
    text_of,
    without,
)
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import Column, Range, stage

FEEDBACK = Column("feedback", says="rows with `feedback` in words on their answer", example=("too long",))
ASK = (
    "{prompt}\n\nAnswer:\n{answer}\n\nFeedback:\n{feedback}\n\nWrite the answer again as the feedback asks.\n"
)
QUESTIONS = (
    "Does the new answer follow the feedback?",
    "Has the answer been improved as the feedback asks?",
    "Would the person who wrote the feedback be content with the new answer?",
)
JUDGE = (
    "Answer:\n{answer}\n\nFeedback:\n{feedback}\n\nNew answer:\n{text}\n\n"
    "{question} Reply with yes or no.\nReply:"
)


@stage(
    example={"n": 2, "max_new_tokens": 3},
    paper="arXiv:2303.16755",
    row="ilf-language-feedback",
    requires=[COMPLETIONS, FEEDBACK, GENERATE, LOGPROBS],
    removes=[PAIRS, CACHED_LOGPROBS, OLD_LOGPROBS],
    provides=[SCORES],
    use_when="people say in words what is wrong with answers, and the model can rewrite them accordingly.",
    costs="`n` refinements of each row, and a forward pass for each refinement and question.",
    covers="refinements by feedback, the choice among them by an ensemble of questions.",
    omits="the choice by embeddings; best-of-n with a reward model on top is decoder `best_of_n`; GPT-3.",
    tests=[
        "methods/stages/rollout/test_ilf.py::test_chosen_refinements_succeed_more_often",
        "methods/stages/rollout/test_ilf.py::test_the_choice_is_the_argmax_of_the_mean",
        "methods/stages/rollout/test_ilf.py::test_one_refinement_is_taken_as_it_is",
    ],
)
class ILF(Stage):
    """One completion per row, the refinement; `scores` is its mean probability of yes. Measures chosen and
    refined, the mean scores of those that were chosen and of all.
    """

    n: Annotated[int, Field(ge=1), Range(2, 16)] = 5  # refinements of each answer
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a refinement
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    ask: str = ASK  # what asks for a refinement, with {prompt}, {answer} and {feedback}
    questions: Annotated[tuple[str, ...], Field(min_length=1)] = QUESTIONS  # wordings that are averaged
    draw: int = 0  # number of the draw; another number gives other samples
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    def __call__(self, rows, roles):
        rows = self.usable(rows, roles)
        requests = []
        for place, row in enumerate(rows):
            answer = text_of(roles, row["completions"][0])
            filled = self.ask.replace("{prompt}", plain(row["prompt"]))
            filled = filled.replace("{answer}", answer).replace("{feedback}", str(row["feedback"]))
            prompt = as_before(row["prompt"], filled)
            requests.append({**row, "prompt": prompt, "place": place, "first": answer})
        how = {"n": self.n, "max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        refined = list(Rollout(**how, draw=self.draw)(requests, roles)) if requests else []
        out, every = [], []
        for row in refined:
            scores = self.scores(row, [text_of(roles, ids) for ids in row["completions"]], roles)
            every += scores
            best = pick({**row, "scores": scores}, [scores.index(max(scores))])
            bare = {key: value for key, value in best.items() if key not in ("place", "first")}
            out.append({**bare, "prompt": rows[row["place"]]["prompt"]})
        if out:
            chosen = sum(row["scores"][0] for row in out) / len(out)
            self.measure(roles, chosen=chosen, refined=sum(every) / len(every))
        return out

    def scores(self, row: dict, texts: list[str], roles: Any) -> list[float]:
        """How surely each refinement uses the feedback: the mean over the questions."""
        tables = [self.likely(row, texts, question, roles) for question in self.questions]
        return [sum(answers) / len(answers) for answers in zip(*tables, strict=True)]

    def likely(self, row: dict, texts: list[str], question: str, roles: Any) -> list[float]:
        """Of each text the probability of yes, of yes and no."""
        rows = []
        for text in texts:
            filled = JUDGE.replace("{answer}", row["first"]).replace("{feedback}", str(row["feedback"]))
            filled = filled.replace("{text}", text).replace("{question}", question)
            plain_text = isinstance(row["prompt"], str)
            replies = [" yes", " no"] if plain_text else ["yes", "no"]
            bare = {**without(row, "prefix"), "prompt": as_before(row["prompt"], filled)}
            rows.append({**bare, "completions": replies})
        out = []
        for yes, no in completion_logprobs(roles.policy, roles, rows, self.batch_size):
            out.append(1 / (1 + math.exp(min(sum(no) - sum(yes), 500.0))))
        return out


def as_before(prompt: Any, text: str) -> Any:
    """A text in the form of a prompt: text, or a user's turn."""
    return text if isinstance(prompt, str) else [{"role": "user", "content": text}]
