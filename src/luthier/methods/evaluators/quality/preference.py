"""A check of preference tuning: whether the model ranks pairs as people did, how the likelihood of both sides
changed, and whether length explains it.

For rows with better and worse completions, the best against the worst: for the policy alone, the reference
alone, and the implicit reward, which is the log-ratio of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches, paired
from luthier.methods.evaluators.representation.implicit_value import correlation
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import best_and_worst
from luthier.methods.roles._base import REFERENCE
from luthier.registry import Metric, evaluator

REWARD_ACCURACY = Metric("reward_accuracy", "reward accuracy", unit="%", better="higher", rank=12)
REWARD_MARGIN = Metric("reward_margin", "reward margin (nats)", better="higher", rank=13)


@evaluator(
    metrics=[
        Metric("ranking_accuracy", "ranking accuracy", unit="%", better="higher", rank=10),
        Metric("reference_ranking_accuracy", "ranking accuracy of the reference", unit="%", rank=11),
        REWARD_ACCURACY,
        REWARD_MARGIN,
        Metric("chosen_drift", "log-prob shift, chosen (nats)", better="higher", rank=14),
        Metric("rejected_drift", "log-prob shift, rejected (nats)", rank=15),
        Metric("length_correlation", "correlation of reward and length", rank=16),
        Metric("length_ratio", "length of preferred / chosen", rank=17),
    ],
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="you tune on pairs and want to know whether the model ranks held-out pairs better, and"
    " whether both sides became unlikelier.",
)
class Preference(Evaluator):
    """`ranking_accuracy` of log p, `reference_ranking_accuracy`, `reward_accuracy` and `reward_margin` (nats)
    of the log-ratio; `chosen_drift` and `rejected_drift`, the log-ratio of each side: below 0 it became less
    likely; `length_correlation` of the log-ratio with a completion's tokens, and `length_ratio`, tokens of
    the completions that the log-ratio prefers over those of the chosen ones.
    """

    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        own = self.totals(roles.policy, roles, paired(rows))
        other = self.totals(roles.reference, roles, paired(rows))
        return self.compare(own, other) if own is not None and other is not None else {}

    def totals(self, policy, roles, rows: list[dict]) -> Totals | None:
        """Log-probabilities of the best and the worst completion of each row; None where no row has two of
        different score.
        """
        return totals(policy, roles, rows, self.batch_size)

    def compare(self, own: Totals, other: Totals) -> dict[str, float]:
        """The policy's and the reference's totals on the same rows -> numbers."""
        return checkup(own, other)


@dataclass
class Totals:
    """Log-likelihoods of pairs under a model: [G] each."""

    chosen: Tensor  # log p, summed
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


@torch.no_grad()
def totals(who, roles, rows: list[dict], size: int | None = None) -> Totals | None:
    """The best and the worst completion of each row, as a role reads them; None where no row tells
    two apart.
    """
    parts = []
    for batch in batches(roles, rows, size):
        logp = batch.sums(who.logprobs(batch).double())
        best, worst = best_and_worst(batch)
        parts.append(
            torch.stack(
                [logp[best], logp[worst], batch.lengths[best].double(), batch.lengths[worst].double()]
            ).cpu()
        )
    return Totals(*torch.cat(parts, 1)) if parts else None


def ranked(better: Tensor, worse: Tensor) -> float:
    """Share of rows in the right order; equals count a half."""
    return float(((better > worse).double() + 0.5 * (better == worse).double()).mean())


def checkup(own: Totals, other: Totals) -> dict[str, float]:
    """The policy's and the reference's totals on the same rows -> numbers."""
    chosen, rejected = own.chosen - other.chosen, own.rejected - other.rejected
    preferred = torch.where(chosen >= rejected, own.chosen_tokens, own.rejected_tokens)
    metrics = {
        "ranking_accuracy": ranked(own.chosen, own.rejected),
        "reference_ranking_accuracy": ranked(other.chosen, other.rejected),
        "reward_accuracy": ranked(chosen, rejected),
        "reward_margin": float((chosen - rejected).mean()),
        "chosen_drift": float(chosen.mean()),
        "rejected_drift": float(rejected.mean()),
        "length_ratio": float(preferred.sum() / own.chosen_tokens.sum()),
    }
    about = correlation(torch.cat([chosen, rejected]), torch.cat([own.chosen_tokens, own.rejected_tokens]))
    return metrics if about is None else {**metrics, "length_correlation": about}
