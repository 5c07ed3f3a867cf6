"""How well a model ranks candidates: R-precision, NDCG and clicks, as the RecSys Challenge 2018 measured
playlists.

Candidates are a row's completions, those with a score above 0 the right ones; the model orders them by their
mean log-probability per token. R-precision: the share of right ones among the first R, where R is how many
there are. NDCG: right ones count 1 / log2(place + 1), over the best that could be. Clicks: how many pages of
ten are turned before the first right one, 51 where there is none. Departs: no credit for songs of the right
artist; rows without a right candidate count with 0, 0 and 51.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.registry import Metric, evaluator

NO_HIT = 51.0  # pages, where no candidate is right
PAGE = 10  # candidates on a page


@evaluator(
    metrics=[
        Metric("r_precision", "R-precision", better="higher"),
        Metric("ndcg", "NDCG", better="higher"),
        Metric("clicks", "pages before the first right one", better="lower"),
    ],
    paper="arXiv:1810.01520",
    row="recsys-2018",
    requires=[COMPLETIONS, SCORES, LOGPROBS],
    use_when="rows have several candidates of which some are right, and the model is to rank them.",
    costs="one forward pass over every completion of the held-out rows.",
    covers="R-precision, NDCG with binary relevance, and clicks: all that the challenge shares with tuning.",
    omits="the credit for songs of the right artist; recommenders, which are no foundation models.",
    tests=[
        "methods/evaluators/quality/test_ranking.py::test_the_measures_by_hand",
        "methods/evaluators/quality/test_ranking.py::test_candidates_are_ranked_by_the_policy",
    ],
)
class Ranking(Evaluator):
    """Means over rows with two candidates or more."""

    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        several = [row for row in rows if len(row.get("scores") or ()) > 1]
        measures = []
        for batch in batches(roles, several, self.batch_size):
            values = batch.means(roles.policy.logprobs(batch)).tolist()
            for row in batch.rows:
                count = len(row["scores"])
                own, values = values[:count], values[count:]
                places = sorted(range(count), key=lambda k, own=own: -own[k])
                measures.append(measure([row["scores"][k] > 0 for k in places]))
        if not measures:
            return {}
        names = ("r_precision", "ndcg", "clicks")
        return {name: math.fsum(column) / len(column) for name, column in zip(names, zip(*measures))}


def measure(right: Sequence[bool]) -> tuple[float, float, float]:
    """R-precision, NDCG and clicks of candidates in their order, by whether each is right."""
    count = sum(right)
    if not count:
        return 0.0, 0.0, NO_HIT
    gain = math.fsum(1 / math.log2(place + 2) for place, hit in enumerate(right) if hit)
    best = math.fsum(1 / math.log2(place + 2) for place in range(count))
    return sum(right[:count]) / count, gain / best, float(list(right).index(True) // PAGE)
