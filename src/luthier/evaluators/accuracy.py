"""Held-out accuracy: what the model would say first is what stands there."""

import torch

from luthier.evaluators._evaluator import Evaluator, batches, liked, paired
from luthier.method import evaluator


@evaluator(wants="completions logprobs top")
class Accuracy(Evaluator):
    """`accuracy`: share of completions whose every supervised token is the likeliest one given those before it, which is
    greedy exact match (of a classifier: plain accuracy). `token_accuracy`: the same per token. For rows with better and
    worse completions also `preference_accuracy`: share of rows whose best is likelier than their worst."""

    batch_size: int = 16  # rows read at once

    def run(self, roles, rows, folder, when):
        tokens, whole = [], []
        for batch in batches(roles, liked(rows), self.batch_size):
            right = (roles.policy.outputs(batch).top(1)[1].squeeze(1) == batch.labels[batch.supervised]).float()
            tokens.append(right)
            whole.append((batch.means(right) == 1).float())
        if not tokens:
            return {}
        out = {"accuracy": float(torch.cat(whole).mean()), "token_accuracy": float(torch.cat(tokens).mean())}
        better = []
        for batch in batches(roles, paired(rows), self.batch_size):
            logprob, scores = batch.sums(roles.policy.logprobs(batch)), batch.column("scores")
            for g in range(len(batch.rows)):
                mine = (batch.group == g).nonzero().squeeze(1)
                better.append(float(logprob[mine[scores[mine].argmax()]] > logprob[mine[scores[mine].argmin()]]))
        return {**out, "preference_accuracy": sum(better) / len(better)} if better else out
