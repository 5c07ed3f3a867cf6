"""Samples of the policy for a share of the rows, and for the others the completions that they came with:
the data of on-policy distillation (GKD).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import CACHED_LOGPROBS, Stage, without
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import Range, stage


@stage(
    example={"max_new_tokens": 3},
    paper="arXiv:2306.13649",
    requires=[COMPLETIONS, GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES, CACHED_LOGPROBS],
    use_when="a student is to learn from a teacher on its own answers and on given ones: under"
    " `online_stages`, with objective `distill_jsd` (GKD).",
    costs="one sample of each prompt in the share.",
)
class MixedRollout(Stage):
    """Column `completions`. Which rows are sampled is drawn for each row and step."""

    share: Annotated[float, Field(ge=0, le=1), Range(0.1, 1.0)] = 0.5  # probability of a sample (GKD: lambda)
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a sample
    temperature: Annotated[float, Field(ge=0)] = 1.0  # sampling temperature

    def __call__(self, rows, roles):
        rows, chosen = list(rows), []
        for place, row in enumerate(rows):
            seed = roles.clock.derive_seed("mixed_rollout", row["id"], place)
            if seed % 2**20 < self.share * 2**20:
                chosen.append({**row, "id": str(place)})
        rollout = Rollout(n=1, max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        samples = {int(row["id"]): row["completions"] for row in rollout(chosen, roles)}
        for place, row in enumerate(rows):
            yield {**without(row), "completions": samples.get(place, row["completions"])}
