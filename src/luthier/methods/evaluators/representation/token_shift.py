"""Which tokens of the tuned model's answers the untuned model would not have written.

Greedy answers of the policy are read by the reference with the same prefix: a token that is also the
reference's first choice is unshifted, one among its next two is marginal, any other is shifted (Lin et al.,
2023). Shifted tokens are mostly of style, and become rarer with the position.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import GENERATE, LOGPROBS
from luthier.methods.evaluators._base import Evaluator
from luthier.methods.formats._base import BadRow
from luthier.methods.roles._base import REFERENCE_OUTPUTS
from luthier.registry import Artifact, Metric, evaluator
from luthier.storage import files

MARGINAL = 3  # the lowest rank of a marginal token
EARLY = 16  # tokens at the beginning of answers
LISTED = 20  # most shifted tokens that are listed


@evaluator(
    metrics=[
        Metric("unshifted_tokens", "tokens that the reference would write too", unit="%"),
        Metric("marginal_tokens", "tokens among the reference's next two", unit="%"),
        Metric("shifted_tokens", "tokens that the reference would not write", unit="%"),
        Metric("shifted_tokens_early", "shifted among the first 16 tokens of answers", unit="%"),
        Metric("shift_kl", "KL of the policy to the reference at answers' tokens (nats)"),
    ],
    artifacts=[Artifact("token-shift.json", says="the most shifted tokens, and shares by position")],
    paper="arXiv:2312.01552",
    row="urial",
    requires=[GENERATE, LOGPROBS, REFERENCE_OUTPUTS],
    use_when="you ask whether tuning changed the style of answers, at their beginning, or what they say.",
    costs="one greedy answer to each of `n` prompts, and a pass of the policy and the reference over them.",
    covers="ranks of each token under the reference, shares by position, KL, and the most shifted tokens.",
    tests=["methods/evaluators/representation/test_token_shift.py::test_a_model_is_not_shifted_from_itself"],
)
class TokenShift(Evaluator):
    """Shares of answers' tokens by their rank under the reference: 1, 2 to 3, and lower."""

    n: Annotated[int, Field(ge=1)] = 32  # prompts that are answered
    max_new_tokens: Annotated[int, Field(ge=1)] = 64  # tokens per answer

    def run(self, roles, rows, folder, when):
        answerable, prompts, seeds = [], [], []
        for row in rows[: self.n]:
            try:
                prompts.append(roles.renderer.prompt(row))
            except BadRow:
                continue
            answerable.append({"id": row["id"], "prompt": row["prompt"]})
            seeds.append(roles.clock.derive_seed("token_shift", row["id"], at=0))
        if not prompts:
            return {}
        written = roles.policy.generate(
            prompts,
            seeds=seeds,
            max_new_tokens=self.max_new_tokens,
            temperature=0.0,
            stop=roles.renderer.stop_ids,
        )
        ranks, places, tokens, divergences = [], [], [], []
        for row, (ids,) in zip(answerable, written, strict=True):
            batch = roles.batch([{**row, "completions": [ids]}])
            labels = batch.labels[batch.targets]
            own, other = roles.policy.outputs(batch), roles.reference.outputs(batch)
            ranks += other.apply(rank, labels).tolist()
            divergences += own.apply(divergence, beside=[other]).tolist()
            places += range(len(labels))
            tokens += labels.tolist()
        return self.summarize(roles, folder, when, ranks, places, tokens, divergences)

    def summarize(self, roles, folder, when, ranks, places, tokens, divergences) -> dict[str, float]:
        """Numbers of all tokens: the rank of each, its place in the answer, its id, the KL there."""
        if not ranks:
            return {}
        shifted = [rank > MARGINAL for rank in ranks]
        early = [moved for moved, place in zip(shifted, places, strict=True) if place < EARLY]
        counts: Counter = Counter()
        by_place: dict[int, list[bool]] = {}
        for moved, place, token in zip(shifted, places, tokens, strict=True):
            by_place.setdefault(place, []).append(moved)
            if moved:
                counts[roles.text([token])] += 1
        curve = [sum(values) / len(values) for _, values in sorted(by_place.items())]
        most = dict(counts.most_common(LISTED))
        files.write_json(folder / "token-shift.json", {"when": when, "shifted": most, "by_position": curve})
        first = sum(rank == 1 for rank in ranks)
        return {
            "unshifted_tokens": first / len(ranks),
            "marginal_tokens": (len(ranks) - first - sum(shifted)) / len(ranks),
            "shifted_tokens": sum(shifted) / len(ranks),
            "shifted_tokens_early": sum(early) / len(early),
            "shift_kl": sum(divergences) / len(divergences),
        }


def rank(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[T, V] and [T] -> [T], 1 for the likeliest token."""
    return (logits > logits.gather(-1, labels[:, None])).sum(-1) + 1


def divergence(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """[T, V] logits of two models -> [T] KL of the first to the second, in nats."""
    own, other = own.float().log_softmax(-1), other.float().log_softmax(-1)
    return (own.exp() * (own - other)).sum(-1)
