"""Whether an answer is more likely after its own prompt than after another's: how much a model follows
instructions before it is tuned to.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[Metric("response_ranking", "response ranking accuracy", unit="%", better="higher")],
    paper="arXiv:2409.14254",
    row="implicit-instruction-tuning",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="you ask what a model already knows of following instructions before it is tuned to.",
    costs="two forward passes over each answer.",
)
class ResponseRanking(Evaluator):
    """`response_ranking`: share of rows whose best completion is more likely, by the mean of its tokens, than
    that of another row (the next one) after the same prompt; one half is chance. Rows of plain text or of
    turns, all of one kind.
    """

    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        rows = [r for r in liked(rows) if r["prompt"]]
        others = [r["completions"][0] for r in (*rows[1:], *rows[:1])]
        pairs = [
            {**r, "completions": [r["completions"][0], o]}
            for r, o in zip(rows, others, strict=True)
            if r["completions"][0] != o
        ]
        if len(pairs) < 2:
            return {}
        won = []
        for batch in batches(roles, pairs, self.batch_size):
            own, other = batch.means(roles.policy.logprobs(batch)).view(-1, 2).unbind(1)
            won.append((own > other).float() + 0.5 * (own == other).float())
        return {"response_ranking": float(torch.cat(won).mean())}
