"""Whether an answer is more likely after its own prompt than after another's: how much a model follows
instructions before it is tuned to.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

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
    costs="one forward pass over each answer after its own prompt, and one after each of `others`.",
    covers="the response-ranking test, for any model before and after tuning.",
    omits="pairwise win rates with length control by a judge model (no such judge is shipped).",
    tests=[
        "methods/evaluators/quality/test_response_ranking.py::test_response_ranking",
        "methods/evaluators/quality/test_response_ranking.py::test_sums_and_several_others",
    ],
)
class ResponseRanking(Evaluator):
    """`response_ranking`: share of pairs in which a row's best completion is more likely than that of another
    row after the same prompt; one half is chance. Rows of plain text or of turns, all of one kind.
    """

    others: Annotated[int, Field(ge=1)] = 1  # the rows after it whose completions each row is compared with
    # likelihood of a completion: the mean of its tokens' log-probabilities, or their sum
    likelihood: Literal["mean", "sum"] = "mean"
    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        rows = [r for r in liked(rows) if r["prompt"]]
        pairs = []
        for distance in range(1, min(self.others, len(rows) - 1) + 1):
            for r, o in zip(rows, [*rows[distance:], *rows[:distance]], strict=True):
                completions = [r["completions"][0], o["completions"][0]]
                if completions[0] != completions[1]:
                    pairs.append({**r, "completions": completions})
        if len(pairs) < 2:
            return {}
        won = []
        for batch in batches(roles, pairs, self.batch_size):
            logprobs = roles.policy.logprobs(batch)
            values = batch.means(logprobs) if self.likelihood == "mean" else batch.sums(logprobs)
            own, other = values.view(-1, 2).unbind(1)
            won.append((own > other).float() + 0.5 * (own == other).float())
        return {"response_ranking": float(torch.cat(won).mean())}
