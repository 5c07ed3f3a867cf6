"""How much a soft prompt of one task is likely to help another: the cosine of the embeddings of both tasks.

The embedding of a task is the mean of the states that predict its answers, when its rows are read behind a
soft prompt. Rows of the source task and of this one are read behind the source's prompt, the teacher's, so
both embeddings lie in one space. The cosine, or 0 where it is negative, is the column `transferability` of
every row; the sources of several runs are ranked by it (Zhong et al., 2022).

Departs: the paper leaves open which layer and which tokens a task's embedding is the mean of; here these are
the last layer and the places that predict supervised tokens.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.architectures._base import HIDDEN
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.roles._base import TEACHER
from luthier.methods.stages._base import Stage
from luthier.registry import Column, stage

TRANSFERABILITY = Column(
    "transferability",
    says="how much the teacher's task is likely to help (stage `transferability`)",
    example=(0.9, 0.9, 0.9),
)


@stage(
    example={"source": "toy:sentiment/train"},
    paper="arXiv:2208.10160",
    row="panda-prompt",
    requires=[COMPLETIONS, TEACHER, HIDDEN],
    provides=[TRANSFERABILITY],
    contract={"gives": "it needs a teacher model, which the recipe names"},
    use_when="a prompt of another task is to teach by objective `panda`, or several are to be ranked before"
    " one is chosen.",
    costs="one forward pass of the teacher over `limit` rows of both tasks.",
    covers="embeddings of both tasks behind the source's prompt and their cosine.",
    omits="the choice among several sources by itself: each is a recipe, and their reports have the number.",
    tests=[
        "methods/objectives/distillation/test_panda.py::test_the_embedding_is_the_mean_state",
        "methods/objectives/distillation/test_panda.py::test_tasks_that_share_labels_transfer",
    ],
)
class Transferability(Stage):
    """Column transferability: one number from 0 to 1, the same for all rows."""

    source: Any = None  # rows of the teacher's task: a file, or rows
    limit: Annotated[int, Field(ge=1)] = 200  # rows of each task that are read
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    def __call__(self, rows, roles):
        if self.source is None:
            raise RecipeError("stage 'transferability' needs rows of the teacher's task; set source")
        rows = list(rows)
        source = load_rows(self.source).rows
        embeddings = []
        for task in (source, rows):
            readable = self.usable(task[: self.limit], roles)
            if not readable:
                raise RecipeError(
                    "stage 'transferability': no row of the source, or none of this task, can be read"
                )
            embeddings.append(mean_state(roles, readable, self.batch_size))
        cosine = float(torch.nn.functional.cosine_similarity(*embeddings, dim=0))
        transferability = max(0.0, cosine)
        self.measure(roles, transferability=transferability)
        self.warn(roles, f"the transferability of the teacher's task is {transferability:.4f}")
        return [{**row, TRANSFERABILITY: transferability} for row in rows]


@torch.no_grad()
def mean_state(roles: Any, rows: list[dict], batch_size: int) -> Tensor:
    """[width] the mean of the states by which the teacher predicts the answers of rows."""
    total, count = torch.tensor(0.0, dtype=torch.float64), 0
    for i in range(0, len(rows), batch_size):
        states = roles.teacher.outputs(roles.batch(rows[i : i + batch_size])).hidden
        total = total + states.double().sum(0).cpu()
        count += len(states)
    return total / count
