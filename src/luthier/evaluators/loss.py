"""Held-out loss: how unlikely the good completions are."""

from luthier.evaluators._evaluator import Evaluator, batches, keep, liked, named
from luthier.method import evaluator


@evaluator(wants="completions logprobs")
class Loss(Evaluator):
    """`loss`: mean -log p per supervised token, over all tokens of each row's best completion."""

    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def by_row(self, roles, rows):
        """Row (and completion, where it has several) -> (-log p of its supervised tokens together, how many they are)."""
        out = {}
        for batch in batches(roles, liked(rows), self.batch_size):
            sums = batch.sums(roles.policy.logprobs(batch).double())
            names = [name for row in batch.rows for name in named(row)]
            out |= {name: (-s, int(n)) for name, s, n in zip(names, sums.tolist(), batch.lengths.tolist(), strict=True)}
        return out

    def run(self, roles, rows, folder, when):
        said = self.by_row(roles, rows)
        tokens = sum(n for _, n in said.values())
        if not tokens:
            return {}
        keep(folder, when, loss=shares(said))
        return {"loss": sum(s for s, _ in said.values()) / tokens}


def shares(said):
    """Row id -> its part of the loss: their mean over rows is the mean over tokens."""
    each = sum(n for _, n in said.values()) / len(said)
    return {k: s / each for k, (s, _) in said.items()}
