"""Where the samples of a round come from, and whether they are still different from each other.

A model that learns from its own samples can collapse: it says one thing, its reward rises, and what the
reward stands for falls. So each row notes the round, a hash of the weights that sampled it and the seed, and
the set of samples is measured before anything is selected: distinct n-grams, entropy of answers, the mean
reward, and how far a second, trusted reward agrees.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage, text_of
from luthier.registry import Column, build, stage

PROVENANCE = Column("provenance", says="where a row's samples come from (stage `provenance`)")


@stage(
    requires=[COMPLETIONS],
    provides=[PROVENANCE],
    use_when="a plan trains in rounds on its own samples: behind `rollout` and `score`, before rows are"
    " selected.",
    costs="hashing the trained weights once, and counting.",
)
class Provenance(Stage):
    """Column `provenance`: {"round", "sampler", "seed"}. Measures, for the report under `stages`: samples,
    distinct_1, distinct_2, distinct_answers, answer_entropy (nats), reward, best_reward, equal_rewards,
    truncated, and with `gold` gold_reward and gold_agreement.
    """

    round: Annotated[int, Field(ge=0)] = 0  # number of the round
    gold: Any = None  # a trusted reward, e.g. exact_match, that is measured beside the one that selects

    @property
    def active_requires(self):
        return self.requires | (build("reward", self.gold).requires if self.gold else frozenset())

    def __call__(self, rows, roles):
        rows = [row for row in rows if row.get("completions")]
        texts = []
        for row in rows:
            texts.append([text_of(roles, completion) for completion in row["completions"]])
        if rows:
            self.measure(roles, **diversity(texts), **self.rewards(rows, texts))
        source = {"round": self.round, "sampler": weights_hash(roles.policy), "seed": roles.clock.seed}
        return [{**row, "provenance": source} for row in rows]

    def rewards(self, rows: Sequence[dict], texts: Sequence[list[str]]) -> dict[str, float]:
        """How good the samples are, by the scores of the rows and by the trusted reward."""
        out: dict[str, float] = {}
        cut = [end for row in rows for end in row.get("truncated", ())]
        if cut:
            out["truncated"] = sum(cut) / len(cut)
        scored = [row["scores"] for row in rows if row.get("scores")]
        if scored:
            out["reward"] = mean([score for scores in scored for score in scores])
            out["best_reward"] = mean([max(scores) for scores in scored])
            out["equal_rewards"] = mean([float(len(set(scores)) == 1) for scores in scored])
        if self.gold:
            judge = build("reward", self.gold)
            gold = [judge.scores(row, some) for row, some in zip(rows, texts, strict=True)]
            flat = [score for scores in gold for score in scores]
            out["gold_reward"] = mean(flat)
            if len(scored) == len(rows):
                out["gold_agreement"] = correlation([s for scores in scored for s in scores], flat)
        return out


def diversity(texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """Of several samples for each of several prompts: distinct words and pairs of words over all samples, and
    of each prompt's answers the share that differ and the entropy in nats, averaged.
    """
    every = [text.split() for some in texts for text in some]
    pairs = [pair for words in every for pair in zip(words, words[1:], strict=False)]
    single = [word for words in every for word in words]
    entropies = []
    for some in texts:
        shares = [count / len(some) for count in Counter(some).values()]
        entropies.append(-sum(share * math.log(share) for share in shares))
    return {
        "samples": float(len(every)),
        "distinct_1": len(set(single)) / max(1, len(single)),
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
        "distinct_answers": mean([len(set(some)) / len(some) for some in texts]),
        "answer_entropy": mean(entropies),
    }


def weights_hash(policy: Any) -> str:
    """16 hexadecimal digits that follow from what is trained of a network: another round, another hash."""
    digest = hashlib.blake2b(digest_size=8)
    tensors = policy.attached.tensors(parts=False)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def mean(values: Sequence[float]) -> float:
    """Of at least one number."""
    return sum(values) / len(values)


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's; 0 where one of them is constant."""
    a = torch.tensor(one, dtype=torch.float64)
    b = torch.tensor(other, dtype=torch.float64)
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 0.0
