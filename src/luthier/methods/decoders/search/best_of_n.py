"""Best of n: several answers are sampled, and one is returned by its reward, by vote, or by both.

`vote` is self-consistency (Wang et al., 2023, arXiv:2203.11171): the answer that most texts give, where
`answer` says what of a text counts. `weighted_vote` sums rewards in place of counts. With `clusters`, only
the answers that most texts give come to that vote (solution-cluster re-ranking, Liu et al., 2023,
arXiv:2310.10047): one cluster is the plain vote, all are the weighted one; a verifier reads fewer texts.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.decoders._base import Decoder
from luthier.methods.decoders.search._base import Search
from luthier.methods.rewards.verifiers.exact_match import ExactMatch
from luthier.registry import Range, build, decoder


@decoder(
    paper="arXiv:2203.11171",
    use_when="a reward or a vote tells good answers from bad ones better than the model writes them; the"
    " baseline of all search at decoding.",
    costs="`samples` answers in place of one; the prompt is read once.",
    example={"samples": 2},
)
class BestOfN(Search):
    """The best of `samples` answers; of an even score the first."""

    samples: Annotated[int, Field(ge=1), Range(2, 64, log=True)] = 8  # answers that are written
    by: Literal["reward", "vote", "weighted_vote"] = "reward"  # how one is chosen
    # for votes: what of a text is its answer (`extract` of reward exact_match)
    answer: Literal["none", "last_number", "after"] = "last_number"
    # with weighted_vote: of the answers, ordered by votes, how many are weighed; null: all
    clusters: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of the samples, where greedy answers are asked for
    decoder: Any = None  # how each answer is written, e.g. iterative_deepening

    def generate(self, roles, rows, prompts, **how):
        n = how.pop("n", 1)
        how["temperature"] = how.get("temperature") or self.temperature
        inner: Decoder | None = build("decoder", self.decoder) if self.decoder is not None else None
        if inner is None:
            written = roles.policy.generate(prompts, n=self.samples * n, **how)
        else:
            written = inner.generate(roles, rows, prompts, n=self.samples * n, **how)
        answers = []
        for row, texts in zip(rows, written, strict=True):
            groups = [texts[k * self.samples : (k + 1) * self.samples] for k in range(n)]
            answers.append([self.best(roles, row, group) for group in groups])
        return answers

    def best(self, roles: Any, row: Any, texts: list[list[int]]) -> list[int]:
        """One of several answers."""
        if self.by == "reward":
            weights = self.scores(roles, row, texts)
            return texts[max(range(len(texts)), key=weights.__getitem__)]
        extract = ExactMatch(extract=self.answer)
        answers = [extract.answer(roles.renderer.answer(ids)) for ids in texts]
        votes: dict[Any, float] = defaultdict(float)
        for answer in answers:
            if answer is not None:
                votes[answer] += 1
        if not votes:
            return texts[0]
        if self.by == "weighted_vote":
            # the largest groups first; of equal ones that which was written first
            largest = sorted(votes, key=lambda answer: -votes[answer])[: self.clusters]
            members = [k for k, answer in enumerate(answers) if answer in largest]
            weights = self.scores(roles, row, [texts[k] for k in members])
            votes = dict.fromkeys(largest, 0.0)
            for k, weight in zip(members, weights, strict=True):
                votes[answers[k]] += weight
        return texts[answers.index(max(votes, key=votes.__getitem__))]
