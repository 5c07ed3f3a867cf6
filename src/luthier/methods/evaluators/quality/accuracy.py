"""Held-out accuracy: whether the most likely token is the label."""

from typing import ClassVar

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.evaluators._base import PerExample, batches, keep, paired
from luthier.methods.formats._base import COMPLETIONS
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("accuracy", "sequence accuracy", unit="%", better="higher", rank=1),
        Metric("token_accuracy", "token accuracy", unit="%", better="higher", rank=2),
        Metric("preference_accuracy", "preference accuracy", unit="%", better="higher", rank=3),
    ],
    requires=[COMPLETIONS, LOGPROBS, TOPK],
    use_when="completions are short and have one right form: classes, facts, short answers.",
    costs="one forward pass over the held-out rows.",
)
class Accuracy(PerExample):
    """`accuracy`: share of completions whose every supervised token is the most likely one given those before
    it, which is greedy exact match (for a classifier: plain accuracy). `token_accuracy`: the same per token.
    For rows with better and worse completions also `preference_accuracy`: share of rows whose best is more
    likely than their worst.
    """

    asks: ClassVar[frozenset[str]] = frozenset({"first"})

    def summarize(self, stats, roles, rows, folder, when):
        if not stats:
            return {}
        out = {
            "accuracy": share(stats),
            "token_accuracy": sum(s.first for s in stats.values()) / sum(s.tokens for s in stats.values()),
        }
        keep(folder, when, accuracy=exact(stats))
        better = {}
        for batch in batches(roles, paired(rows), self.batch_size):
            logprob, scores = batch.sums(roles.policy.logprobs(batch)), batch.column("scores")
            for g, row in enumerate(batch.rows):
                mine = (batch.group == g).nonzero().squeeze(1)
                better[str(row["id"])] = float(
                    logprob[mine[scores[mine].argmax()]] > logprob[mine[scores[mine].argmin()]]
                )
        if better:
            keep(folder, when, preference_accuracy=better)
            out["preference_accuracy"] = sum(better.values()) / len(better)
        return out


def exact(stats):
    """Row id -> 1 where every token is right."""
    return {i: float(s.first == s.tokens) for i, s in stats.items()}


def share(stats):
    """Of rows whose every token is right."""
    return sum(exact(stats).values()) / len(stats)
