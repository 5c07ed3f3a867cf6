"""Held-out loss: mean negative log-likelihood of the good completions."""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import PerExample, keep
from luthier.methods.formats._base import COMPLETIONS
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("loss", "loss", better="lower", rank=0),
    ],
    requires=[COMPLETIONS, LOGPROBS],
    use_when="always; it is the measure that most decisions rest on, and it runs by default.",
    costs="one forward pass over the held-out rows.",
)
class Loss(PerExample):
    """`loss`: mean -log p per supervised token, over all tokens of each row's best completion."""

    def summarize(self, stats, roles, rows, folder, when):
        tokens = sum(s.tokens for s in stats.values())
        if not tokens:
            return {}
        keep(folder, when, loss=shares(stats))
        return {"loss": sum(s.loss for s in stats.values()) / tokens}


def shares(stats):
    """Row id -> its part of the loss: their mean over rows is the mean over tokens."""
    each = sum(s.tokens for s in stats.values()) / len(stats)
    return {k: s.loss / each for k, s in stats.items()}
