"""Held-out accuracy: what the model would say first is what stands there."""

from luthier.evaluators._evaluator import Evaluator, batches, keep, liked, named, paired
from luthier.method import evaluator


@evaluator(wants="completions logprobs top")
class Accuracy(Evaluator):
    """`accuracy`: share of completions whose every supervised token is the likeliest one given those before it, which is
    greedy exact match (of a classifier: plain accuracy). `token_accuracy`: the same per token. For rows with better and
    worse completions also `preference_accuracy`: share of rows whose best is likelier than their worst."""

    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def by_row(self, roles, rows):
        """Row (and completion, where it has several) -> (supervised tokens said first, how many they are)."""
        out = {}
        for batch in batches(roles, liked(rows), self.batch_size):
            right = (roles.policy.outputs(batch).first() == batch.labels[batch.supervised]).float()
            names = [name for row in batch.rows for name in named(row)]
            out |= {name: (round(k), int(n)) for name, k, n in zip(names, batch.sums(right).tolist(), batch.lengths.tolist(), strict=True)}
        return out

    def run(self, roles, rows, folder, when):
        said = self.by_row(roles, rows)
        if not said:
            return {}
        out = {"accuracy": share(said), "token_accuracy": sum(k for k, _ in said.values()) / sum(n for _, n in said.values())}
        keep(folder, when, accuracy=exact(said))
        better = {}
        for batch in batches(roles, paired(rows), self.batch_size):
            logprob, scores = batch.sums(roles.policy.logprobs(batch)), batch.column("scores")
            for g, row in enumerate(batch.rows):
                mine = (batch.group == g).nonzero().squeeze(1)
                better[str(row["id"])] = float(logprob[mine[scores[mine].argmax()]] > logprob[mine[scores[mine].argmin()]])
        if better:
            keep(folder, when, preference_accuracy=better)
            out["preference_accuracy"] = sum(better.values()) / len(better)
        return out


def exact(said):
    """Row id -> 1 where every token is right."""
    return {i: float(k == n) for i, (k, n) in said.items()}


def share(said):
    """Of rows whose every token is right."""
    return sum(exact(said).values()) / len(said)
