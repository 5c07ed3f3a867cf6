"""SFT on one kind of completion: the completions of a row (such as an answer and a rationale) can be weighted
as separate tasks.

The column `tasks` names the task of each completion (the stage `rationale` writes it). Each task keeps its
own average.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.stages.curate.rationale import TASKS
from luthier.registry import objective


@objective(
    requires=[COMPLETIONS, TASKS, LOGPROBS],
    use_when="rows have completions of several tasks and each task should keep its own average and weight.",
    costs="as `sft`.",
    starting_rate="that of `sft`.",
)
class TaskSFT(Objective):
    """-log p of each supervised token of the completions of a task."""

    task: str = "answer"  # the task's name in the column `tasks`

    def chosen(self, batch):
        """[T] is this a token of the task?"""
        mine = [t == self.task for row in batch.rows for t in row["tasks"]]
        return torch.tensor(mine, device=batch.ids.device)[batch.owner]

    def count(self, batch):
        return int(self.chosen(batch).sum())

    def rows_of_units(self, batch):
        return batch.group[batch.owner][self.chosen(batch)]

    def loss(self, roles, batch):
        return -roles.policy.logprobs(batch)[self.chosen(batch)]
