"""Rows for a judge that needs no reference (Self-J): the model rates its own answers with the right answer
before it, and those ratings teach it to rate without.

A rating is the mean digit by the probabilities of the digits. It is corrected by how like the answer is to
the right one, as the cosine of their embeddings on the scale of the ratings. Objective `self_judge` learns
it.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import HIDDEN, LOGPROBS
from luthier.methods.formats._base import ANSWER, COMPLETIONS, PAIRS, SCORES
from luthier.methods.rewards.judges.rating_judge import digits, mean_digit, rating_prompt
from luthier.methods.stages._base import Stage, completion_logprobs, text_of, without
from luthier.methods.stages.select._embedding import embed
from luthier.registry import Column, stage

REFERENCE_RATINGS = Column(
    "reference_ratings",
    per="completion",
    says="how likely each rating is where the right answer is read, too (stage self_ratings)",
    example=(0.2, 0.5, 0.3),
)
QUALITY = Column("quality", says="the rating that is learned (stage self_ratings)", example=(0.4, 0.8))


@stage(
    paper="arXiv:2409.00935",
    row="self-j",
    requires=[COMPLETIONS, ANSWER, LOGPROBS, HIDDEN],
    provides=[COMPLETIONS, SCORES, REFERENCE_RATINGS, QUALITY],
    removes=[PAIRS],
    use_when="a judge is wanted without ratings by people: rows with right answers and sampled completions"
    " (under `stages` behind `rollout`), for objective `self_judge`.",
    costs="a reading of each completion by the policy, and embeddings.",
    covers="ratings with the reference, corrected by likeness.",
    omits="fusion by ranks.",
    tests=["methods/objectives/reward/test_self_judge.py::test_ratings_and_likeness_are_joined"],
)
class SelfRatings(Stage):
    """A row for each completion: the question without the reference, the ratings as completions, and their
    numbers as `scores`.
    """

    most: Annotated[int, Field(ge=2, le=9)] = 5  # the highest rating
    likeness: Annotated[float, Field(ge=0, le=1)] = 0.5  # weight of the likeness to the right answer
    encoder: str | None = None  # who embeds: a folder or hub name of an encoder; null: the policy
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows that are read together

    def __call__(self, rows, roles):
        texts, answers, bare, informed = [], [], [], []
        for row in rows:
            answer = row["answer"][0] if isinstance(row["answer"], (list, tuple)) else row["answer"]
            for k, completion in enumerate(row["completions"]):
                texts.append(text_of(roles, completion))
                answers.append(str(answer))
                base = {**without(row), "id": f"{row['id']}/{k}", "completions": digits(self.most)}
                bare.append({**base, "prompt": rating_prompt(row["prompt"], texts[-1], self.most)})
                asks = rating_prompt(row["prompt"], texts[-1], self.most, answers[-1])
                informed.append({**base, "prompt": asks})
        if not texts:
            return []
        own, right = (embed(roles, part, self.encoder, self.batch_size) for part in (texts, answers))
        alike = (own * right).sum(1).clamp(0, 1).tolist()
        out = []
        each = completion_logprobs(roles.policy, roles, informed, self.batch_size)
        for row, logs, like in zip(bare, each, alike, strict=True):
            likely = torch.tensor([sum(tokens) for tokens in logs]).softmax(0).tolist()
            rating = mean_digit(likely)
            quality = (1 - self.likeness) * rating + self.likeness * (1 + (self.most - 1) * like)
            numbers = [float(k) for k in range(1, self.most + 1)]
            out.append({**row, "scores": numbers, "reference_ratings": likely, "quality": quality})
        return out
