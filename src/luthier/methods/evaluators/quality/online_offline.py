"""LAE's answer: of what was learned fast and what moved slowly, whichever is surer.

A token's probability is the larger one of both networks', max(p_online, p_offline), and the most likely token
under it is the answer (Gao et al., 2023); a row is right where each of its supervised tokens is. Beside this
accuracy stands that of the offline module alone. All are measured for every source of the rows too, as a
stream of tasks reads them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.evaluators._base import Evaluator, batches, keep, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.roles.averages.offline import OFFLINE
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("joint_accuracy", "accuracy of online and offline together", unit="%", better="higher"),
        Metric("offline_accuracy", "accuracy of the offline module", unit="%", better="higher"),
    ],
    paper="arXiv:2303.10070",
    row="lae",
    requires=[COMPLETIONS, LOGPROBS, TOPK, OFFLINE],
    use_when="tasks come one after the other under plan `lae`, which sets it by itself.",
    costs="two forward passes over the held-out rows, and the logits of both for a batch.",
    covers="the ensemble by the larger probability, over all rows and by source.",
    omits="generation by both networks.",
    tests=[
        "methods/evaluators/quality/test_online_offline.py::test_the_surer_one_answers",
        "methods/evaluators/quality/test_online_offline.py::test_with_equal_modules_it_is_plain_accuracy",
    ],
)
class OnlineOffline(Evaluator):
    """`joint_accuracy` and `offline_accuracy`, over all rows and, as `joint_accuracy/NAME` and
    `offline_accuracy/NAME`, over those of each source.
    """

    column: str = "source"  # column that says where a row is from
    batch_size: Annotated[int, Field(ge=1)] | None = None  # rows read at once; by default as many as fit

    @torch.no_grad()
    def run(self, roles, rows, folder, when):
        right: dict[str, dict[str, float]] = defaultdict(dict)
        for batch in batches(roles, liked(rows), self.batch_size):
            online, offline = roles.policy.outputs(batch), roles.offline.outputs(batch)
            labels = batch.labels[batch.targets]
            answers = {
                "joint_accuracy": online.apply(surer, beside=[offline]),
                "offline_accuracy": offline.first(),
            }
            for metric, chosen in answers.items():
                exact = (batch.sums((chosen == labels).float()) == batch.lengths).float()
                for row, value in zip(batch.rows, exact.tolist(), strict=True):
                    right[metric][str(row["id"])] = value
                    right[f"{metric}/{row.get(self.column)}"][str(row["id"])] = value
        keep(folder, when, **right)
        return {metric: sum(values.values()) / len(values) for metric, values in right.items()}


def surer(online: Tensor, offline: Tensor) -> Tensor:
    """Logits [C, V] of both -> [C] the token with the largest probability in either."""
    return torch.maximum(online.softmax(-1), offline.softmax(-1)).argmax(-1)
