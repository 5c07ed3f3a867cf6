"""Correlation of the log-sum-exp of the logits with the score of a completion: whether logits behave as
values.
"""

import torch
from torch import Tensor

from luthier.methods.architectures._base import TOPK
from luthier.methods.evaluators._base import Evaluator, batches
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("value_correlation", "correlation of logits' value and score"),
        Metric("value_correlation_last", "correlation of logits' value and score, last token"),
    ],
    paper="arXiv:2507.00018",
    row="sft-dpo-bridge",
    requires=[COMPLETIONS, SCORES, TOPK],
    use_when="you study whether the model's logits act as a value function of the rewards that rows carry.",
    costs="one forward pass over the held-out rows.",
)
class ImplicitValue(Evaluator):
    """`value_correlation`: of a completion's score with V, the log-sum-exp of the logits, averaged over its
    tokens; `value_correlation_last`: with V at its last token. For completions with scores, over all rows.
    """

    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        means, lasts, scores = [], [], []
        for batch in batches(roles, rows, self.batch_size):
            v = roles.policy.outputs(batch).apply(lambda z: z.logsumexp(-1))
            means.append(batch.means(v))
            lasts.append(batch.last(v))
            scores.append(batch.column("scores"))
        columns = {"value_correlation": means, "value_correlation_last": lasts}
        metrics = {
            name: correlation(torch.cat(values), torch.cat(scores))
            for name, values in columns.items()
            if values
        }
        return {name: value for name, value in metrics.items() if value is not None}


def correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's; None where one of them does not vary."""
    x, y = (v.double() - v.double().mean() for v in (x, y))
    size = x.norm() * y.norm()
    return float((x @ y) / size) if len(x) > 1 and size > 1e-12 else None
