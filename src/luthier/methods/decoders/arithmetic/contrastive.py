"""Contrastive decoding: a token that a strong model prefers and a weak one does not.

Scores are log p_policy - log p_amateur among the tokens that the policy finds plausible, p >= alpha * max p
(Li et al., 2023, arXiv:2210.15097). With `weight`, (1 + weight) * policy - weight * amateur in logits, as
O'Brien and Lewis (2023) use it for reasoning.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.decoders.arithmetic._joined import OWN_BASE, Arithmetic
from luthier.methods.decoders.arithmetic._plausible import implausible
from luthier.registry import decoder


@decoder(
    paper="arXiv:2210.15097",
    use_when="a model repeats itself or takes easy ways, and a weaker one of its family is at hand; or what"
    " tuning added is to be stressed (`amateur: base`).",
    costs="a step of the amateur for each token, with a cache of its own.",
    example={"amateur": "toy:lm"},
)
class Contrastive(Arithmetic):
    """log p_policy - log p_amateur, or a weighted form of it, among plausible tokens."""

    amateur: str = OWN_BASE  # the weaker model; base: the policy with its tuner off
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.1  # a plausible token has this share of the best's p
    # null: the difference alone; a number: (1 + weight) * policy - weight * amateur
    weight: Annotated[float, Field(ge=0)] | None = None

    def models(self):
        return [self.amateur]

    def combine(self, logits):
        policy, amateur = (one.log_softmax(-1) for one in logits)
        score = policy - amateur
        if self.weight is not None:
            score = policy + self.weight * (policy - amateur)
        return score.masked_fill(implausible(policy, self.alpha), -float("inf"))
