"""A language model on this machine that rates a text from 1 to `most`: the mean digit under the probabilities
of the digits alone.

What stage `self_ratings` and objective `self_judge` train; any model can be asked. Answers whose rating is
below a threshold can be withheld (evaluator `selective`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.rewards.judges._judge import plain
from luthier.methods.rewards.models._models import ModelReward, loaded
from luthier.registry import reward

QUESTION = (
    "Rate how good the answer is, from 1 (wrong or useless) to {most} (right and complete). Say a digit.\n\n"
    "Question:\n{prompt}\n\n{reference}Answer:\n{text}\n\nRating:"
)


def rating_prompt(prompt: Any, text: str, most: int, reference: str | None = None) -> str:
    """The question about a text; with a reference answer, if there is one."""
    before = "" if reference is None else f"A right answer:\n{reference}\n\n"
    filled = QUESTION.replace("{most}", str(most)).replace("{prompt}", plain(prompt))
    return filled.replace("{reference}", before).replace("{text}", text)


def digits(most: int) -> list[str]:
    """The replies that are compared."""
    return [f" {k}" for k in range(1, most + 1)]


def mean_digit(likely: Sequence[float]) -> float:
    """The expected digit. likely: probabilities of 1, 2, ..."""
    return sum(k * p for k, p in enumerate(likely, 1))


@reward(
    paper="arXiv:2409.00935",
    row="self-j",
    use_when="a model should rate answers without a reference: one that was tuned by `self_judge`, or any.",
    costs="the judge in memory and a forward pass over each text.",
    covers="the expected rating, for best-of-n and for selective answers.",
    tests=["methods/objectives/reward/test_self_judge.py::test_the_judge_reads_what_it_was_tuned_on"],
)
class RatingJudge(ModelReward):
    """Between 1 and `most`."""

    most: Annotated[int, Field(ge=2, le=9)] = 5  # the highest rating

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        roles, rows, out = loaded(self.model, self.dtype), [], []
        for place, text in enumerate(texts):
            prompt = rating_prompt(row["prompt"], text, self.most)
            rows.append({"id": str(place), "prompt": prompt, "completions": digits(self.most)})
        for i in range(0, len(rows), self.batch_size):
            batch = roles.batch(rows[i : i + self.batch_size])
            with torch.no_grad(), roles.policy.eval_mode():
                logs = batch.sums(roles.policy.logprobs(batch).float())
            out += [mean_digit(likely) for likely in logs.view(-1, self.most).softmax(-1).tolist()]
        return out
