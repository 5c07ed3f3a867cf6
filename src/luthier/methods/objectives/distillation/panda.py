"""PANDA: a soft prompt is taught by another task's prompt on the same network, in place of starting from it.

The teacher is the frozen network behind the source task's prompt, on the rows of the target task; the policy
begins with a new prompt. The term is the mean over the vocabulary of the squared difference of their logits
at each supervised token, times how transferable the source is, which stage `transferability` predicts. It
stands beside the loss of the task: `sft + 0.1*panda`, by the coefficient of the authors' code (Zhong et al.,
2022).

Departs: a language model needs no head of its own for the target, so the teacher has the network's. The
authors' code divides by the batch size as well, which would let the term depend on how a batch is split.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from luthier.methods.architectures._base import HIDDEN, LOGPROBS, TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.roles._base import TEACHER
from luthier.methods.stages.curate.transferability import TRANSFERABILITY
from luthier.registry import objective


@objective(
    paper="arXiv:2208.10160",
    row="panda-prompt",
    requires=[COMPLETIONS, TEACHER, LOGPROBS, TOPK],
    use_when="a soft prompt of a similar task exists on the same network and few rows of the new task are"
    " at hand: `sft + 0.1*panda` with tuner `prompt` and `roles: {teacher: {name: model, model: RUN}}`.",
    costs="a second network in memory and its forward pass over the same rows, without gradient.",
    starting_rate="that of `sft` with tuner `prompt`.",
    covers="distillation of logits or hidden states from the source's prompt, weighed row by row by the"
    " predicted transferability.",
    omits="several sources at once, by average of their prompts or of their outputs; the paper's"
    " measurements.",
    tests=[
        "methods/objectives/distillation/test_panda.py::test_the_term_by_hand_and_zero_for_the_same_prompt",
        "methods/objectives/distillation/test_panda.py::test_without_transferability_it_is_prompt_tuning",
        "methods/objectives/distillation/test_panda.py::test_tasks_that_share_labels_transfer",
    ],
)
class Panda(Objective):
    """Transferability times the squared distance from the teacher."""

    match: Literal["logits", "hidden"] = "logits"  # what of the teacher is matched
    adaptive: bool = True  # weigh rows by their column `transferability`; false: all by 1

    @property
    def active_requires(self):
        needs = self.requires | ({HIDDEN} if self.match == "hidden" else frozenset())
        return needs | ({TRANSFERABILITY} if self.adaptive else frozenset())

    def loss(self, roles, batch):
        ours, theirs = roles.policy.outputs(batch), roles.teacher.outputs(batch)
        if self.match == "hidden":
            apart = (ours.hidden.float() - theirs.hidden.float()).square().mean(-1)
        else:
            apart = ours.apply(squared, beside=[theirs])
        batch.note(teacher_distance=apart)
        if not self.adaptive:
            return apart
        weight = torch.tensor([float(row[TRANSFERABILITY]) for row in batch.rows], device=apart.device)
        return weight[self.rows_of_units(batch)] * apart


def squared(policy: Tensor, teacher: Tensor) -> Tensor:
    """Logits [C, V] of both -> [C] the mean of their squared differences."""
    return (policy.float() - teacher.float()).square().mean(-1)
