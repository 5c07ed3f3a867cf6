"""GOT-D: the rows that pull the model's own distribution towards a target, by the gradient of optimal
transport.

With rows like those of pretraining as the source P and rows of the target task as Q, the dual potential f
of the entropic transport from P to Q says how the distance changes with the mass of each row; f_i minus the
mean of the others, where total mass is kept. Rows with the lowest value are taken (Kang et al., 2024):
those that are nearest to what the target has and the pool lacks, not those most like the target.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.data.load import load_rows
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.stages._base import Stage
from luthier.methods.stages.select._embedding import embed, texts_of
from luthier.registry import stage


@stage(
    example={"n": 3, "target": "toy:arithmetic/train"},
    paper="arXiv:2405.02774",
    row="got-d",
    requires=[LOGPROBS],
    use_when="a large pool of unlabelled rows and some hundred rows of the target task are at hand, and the"
    " model is to be trained on some of the pool before the task.",
    costs="embeddings of the pool and the target, and Sinkhorn's iterations on their matrix.",
    covers="the calibrated gradient of entropic optimal transport, and the choice by it.",
    omits="pools of millions of rows: the whole matrix is held.",
    tests=[
        "methods/stages/select/test_choice.py::test_the_calibrated_gradient_is_that_of_optimal_transport",
        "methods/stages/select/test_choice.py::test_chosen_rows_pull_the_pool_to_the_target",
    ],
)
class GotD(Stage):
    """The `n` rows whose mass lowers the transport distance to the target most."""

    target: Any = "toy:arithmetic/train"  # rows of the target task: a file, or rows
    n: Annotated[int, Field(ge=1)] = 1000  # rows that are kept
    regularization: Annotated[float, Field(gt=0)] = 0.02  # entropic, relative to the mean cost
    iterations: Annotated[int, Field(ge=1)] = 300  # of Sinkhorn
    part: Literal["prompt", "row"] = "row"  # what is embedded: the prompt, or the answer as well
    encoder: str | None = None  # a sentence encoder (folder or hub name); null: the policy's last layer
    batch_size: Annotated[int, Field(ge=1)] = 16  # rows per forward pass

    def __call__(self, rows, roles):
        rows = list(rows)
        target = load_rows(self.target).rows
        pool = embed(roles, texts_of(roles, rows, self.part), self.encoder, self.batch_size)
        goal = embed(roles, texts_of(roles, target, self.part), self.encoder, self.batch_size)
        gradient = calibrated_gradient(torch.cdist(pool, goal), self.regularization, self.iterations)
        chosen = gradient.argsort()[: self.n].tolist()
        return self.drop(roles, rows, chosen, "they pull less towards the target")


def calibrated_gradient(cost: Tensor, regularization: float, iterations: int) -> Tensor:
    """[N] how the transport distance changes with the mass of each source row, total mass kept.

    cost: [N, M]. Sinkhorn in log space, in float64; rows and columns have equal mass.
    """
    cost = cost.double()
    epsilon = regularization * float(cost.mean())
    n, m = cost.shape
    f, g = torch.zeros(n, dtype=cost.dtype), torch.zeros(m, dtype=cost.dtype)
    for _ in range(iterations):
        f = -epsilon * (torch.logsumexp((g[None] - cost) / epsilon, 1) - math.log(m))
        g = -epsilon * (torch.logsumexp((f[:, None] - cost) / epsilon, 0) - math.log(n))
    return f - (f.sum() - f) / max(1, n - 1)
