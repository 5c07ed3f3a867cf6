"""A language model on this machine as the judge, by how likely its options are, not by what it writes.

Alone, a text's score is the probability of the first option (yes). Where a row has a `reference` to compare
with (`compare: true`, column `answer`), it is the probability that the text is the better one, averaged
over both orders, so that a preference for a place cancels.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.formats._base import ANSWER
from luthier.methods.rewards.judges._judge import Judge, check_template
from luthier.methods.rewards.models._models import loaded
from luthier.registry import reward

ALONE = (
    "Question:\n{prompt}\n\nAnswer:\n{text}\n\nIs this answer {criteria}? Reply with yes or no only.\nReply:"
)
COMPARE = (
    "Question:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n"
    "Which answer is more {criteria}? Reply with A or B only.\nReply:"
)


@reward(
    paper="arXiv:2306.05685",
    use_when="no rule and no reward model measures what you want, and a language model on this machine"
    " can tell.",
    costs="the judge in memory and a forward pass over each question; with `compare` two.",
)
class OptionJudge(Judge):
    """Between 0 and 1: the probability of the first option among the options."""

    model: str = "toy:lm"  # a run's folder, a model's folder, a Hub name or toy:NAME
    dtype: str = "auto"  # precision in which it is loaded
    compare: bool = False  # compare with the row's `answer`, in both orders
    template: str = ""  # the question, with {prompt} and {text} ({first} and {second}); empty: a plain one
    options: tuple[str, str] = ("yes", "no")  # replies alone; the first one is good. With compare: A and B
    # read the question as a user's turn in the chat template; false: as it is, null: as the model was tuned
    turns: bool | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8  # questions per forward pass

    def __post_init__(self):
        places = ("{first}", "{second}") if self.compare else ("{text}",)
        check_template(self.template or (COMPARE if self.compare else ALONE), *places)

    @property
    def active_requires(self):
        return self.requires | {ANSWER} if self.compare else self.requires

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        template = self.template or (COMPARE if self.compare else ALONE)
        if not self.compare:
            return self.ask([self.question(template, row, text=text) for text in texts], self.options)
        other, questions = str(self.column(row, "answer")), []
        for text in texts:
            questions.append(self.question(template, row, first=text, second=other))
            questions.append(self.question(template, row, first=other, second=text))
        first = self.ask(questions, ("A", "B") if self.options == ("yes", "no") else self.options)
        return [(a + 1 - b) / 2 for a, b in zip(first[0::2], first[1::2], strict=True)]

    def ask(self, questions: list[str], options: tuple[str, str]) -> list[float]:
        """How likely the first option is as the reply to each question, of the two."""
        roles, rows = loaded(self.model, self.dtype), []
        turns = chat_model(self.model, self.dtype) if self.turns is None else self.turns
        for place, question in enumerate(questions):
            prompt: Any = [{"role": "user", "content": question}] if turns else question
            replies: list[Any] = list(options)
            if not turns:
                replies = [" " + option for option in options]
            rows.append({"id": str(place), "prompt": prompt, "completions": replies})
        out: list[float] = []
        for i in range(0, len(rows), self.batch_size):
            batch = roles.batch(rows[i : i + self.batch_size])
            with torch.no_grad(), roles.policy.eval_mode():
                logs = batch.sums(roles.policy.logprobs(batch).float())
            out += logs.view(-1, 2).softmax(-1)[:, 0].tolist()
        return out


@cache
def chat_model(model: str, dtype: str) -> bool:
    """Does a model have a chat template of its own?"""
    return loaded(model, dtype).renderer.note is None
