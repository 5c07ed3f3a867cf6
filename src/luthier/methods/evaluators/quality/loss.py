"""Held-out loss: how unlikely the good completions are."""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import ByRow, keep
from luthier.methods.formats._base import COMPLETIONS
from luthier.registry import evaluator


@evaluator(requires=[COMPLETIONS, LOGPROBS])
class Loss(ByRow):
    """`loss`: mean -log p per supervised token, over all tokens of each row's best completion."""

    def told(self, said, roles, rows, folder, when):
        tokens = sum(s.tokens for s in said.values())
        if not tokens:
            return {}
        keep(folder, when, loss=shares(said))
        return {"loss": sum(s.loss for s in said.values()) / tokens}


def shares(said):
    """Row id -> its part of the loss: their mean over rows is the mean over tokens."""
    each = sum(s.tokens for s in said.values()) / len(said)
    return {k: s.loss / each for k, s in said.items()}
