"""A language model behind a URL as the judge: it writes a number, and what it wrote is cached.

Any server that speaks the chat completions protocol: hosted ones, vLLM, llama.cpp, Ollama. Requests are
tried again where the server is busy. The same question is asked once, also in a later run (`store`), so a
resumed run goes on with the same scores; with `price` and `budget` a run stops where it has cost too much.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.rewards.judges._judge import Judge, check_template
from luthier.programs.models import Remembering
from luthier.registry import build, reward

QUESTION = (
    "Question:\n{prompt}\n\nAnswer:\n{text}\n\nHow {criteria} is this answer? Think briefly, then end with a"
    " line that says only: Score: N, where N is a whole number from {low} (worst) to {high} (best)."
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@reward(
    paper="arXiv:2306.05685",
    use_when="a large language model behind a URL is to judge texts.",
    costs="a request for each different question; no memory here.",
)
class EndpointJudge(Judge):
    """(number - low) / (high - low), from 0 to 1; `unreadable` where the reply has no number after
    `marker`.
    """

    base_url: str = "http://localhost:8000/v1"  # URL up to and including the version
    model: str = ""  # name of the model at that URL
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the API key, if one is needed
    template: str = QUESTION  # the question, with {prompt}, {text}, {criteria}, {low} and {high}
    marker: str = "Score:"  # what stands before the number; the last one counts
    low: float = 1  # the worst number
    high: float = 10  # the best number
    unreadable: float = 0.0  # score of a reply without a number
    max_new_tokens: Annotated[int, Field(ge=1)] = 256  # of a reply
    timeout: Annotated[float, Field(gt=0)] = 120.0  # seconds to wait for a reply
    retries: Annotated[int, Field(ge=0)] = 3  # further attempts if it is busy or does not answer
    parallel: Annotated[int, Field(ge=1)] = 8  # requests at a time
    store: str = ""  # file of cached replies; empty: they are forgotten with the process
    price: Annotated[float, Field(ge=0)] = 0.0  # what a thousand characters cost, question and reply together
    budget: Annotated[float, Field(gt=0)] | None = None  # stop the run where it has cost more than this

    def __post_init__(self):
        check_template(self.template, "{text}")
        if not self.low < self.high:
            raise ValueError(f"low: {self.low} must be below high, {self.high}")

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        template = self.template.replace("{low}", f"{self.low:g}").replace("{high}", f"{self.high:g}")
        questions = {text: self.question(template, row, text=text) for text in dict.fromkeys(texts)}
        replies = self.desk().ask([*questions.values()], self.parallel)
        by_text = dict(zip(questions, map(self.grade, replies), strict=True))
        return [by_text[text] for text in texts]

    def grade(self, reply: str) -> float:
        """From a reply to a number."""
        _, mark, rest = reply.rpartition(self.marker)
        number = NUMBER.search(rest) if mark else None
        if number is None:
            return self.unreadable
        value = min(self.high, max(self.low, float(number.group())))
        return (value - self.low) / (self.high - self.low)

    def desk(self) -> Desk:
        """Who is asked: one for all rewards with the same settings, so that questions and costs are counted
        together.
        """
        where = (self.base_url, self.model, self.api_key_env, self.timeout, self.retries)
        return desk(where, self.store, self.max_new_tokens, self.price, self.budget)


class Desk:
    """Asks a model behind a URL, and counts its questions and costs."""

    def __init__(self, stored: Remembering, max_new_tokens: int, price: float, budget: float | None):
        self.stored, self.price, self.budget = stored, price, budget
        self.how = {"temperature": 0.0, "seed": 0, "max_new_tokens": max_new_tokens}
        self.questions, self.cost = 0, 0.0

    def ask(self, questions: list[str], parallel: int) -> list[str]:
        """The replies, those that are new by several requests at a time. Raises RecipeError where none comes,
        or where the budget is spent.
        """
        replies = {question: self.stored.recall(question, self.how) for question in questions}
        new = [question for question, reply in replies.items() if reply is None]
        if new and self.budget is not None and self.cost > self.budget:
            raise RecipeError(f"reward 'endpoint_judge': it has cost {self.cost:.2f}, its budget is spent")
        with ThreadPoolExecutor(parallel) as pool:
            answers = pool.map(lambda question: self.stored.speaker.ask(question, **self.how), new)
            for question, reply in zip(new, answers, strict=True):
                self.stored.store(question, self.how, reply)
                replies[question] = reply
                self.questions += 1
                self.cost += self.price * (len(question) + len(reply)) / 1000
        return [str(replies[question]) for question in questions]


@cache
def desk(where: tuple, path: str, max_new_tokens: int, price: float, budget: float | None) -> Desk:
    """The desk for some settings, opened once."""
    base_url, model, api_key_env, timeout, retries = where
    settings = {"base_url": base_url, "model": model, "api_key_env": api_key_env}
    speaker = build("role", {"name": "endpoint", **settings, "timeout": timeout, "retries": retries})
    stored = Remembering(speaker.play("judge", None), Path(path).expanduser() if path else ":memory:")
    return Desk(stored, max_new_tokens, price, budget)
