"""Held-out loss: how unlikely the good completions are."""

from luthier.evaluators._evaluator import Evaluator, batches, liked
from luthier.method import evaluator


@evaluator(wants="completions logprobs")
class Loss(Evaluator):
    """`loss`: mean -log p per supervised token, over all tokens of each row's best completion."""

    batch_size: int = 16  # rows read at once

    def run(self, roles, rows, folder, when):
        total, count = 0.0, 0
        for batch in batches(roles, liked(rows), self.batch_size):
            logprobs = roles.policy.logprobs(batch)
            total, count = total - float(logprobs.double().sum()), count + len(logprobs)
        return {"loss": total / count} if count else {}
