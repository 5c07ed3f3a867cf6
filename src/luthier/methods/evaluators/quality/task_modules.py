"""Accuracy of a set of modules, one for each task, among which a selector chooses for every input.

The policy is the selector: its log-probabilities of the tasks' names order the tasks, and the `top_k` first
stay. Each of their modules scores its own task's classes, all scores stand side by side, and the best is the
answer (Song et al., 2023). With `top_k: 1` it is hard routing. Modules are small and lie over one network, so
they are exchanged, not loaded anew.

Departs: a class is a completion and its score the log-probability of the whole text; in the paper it is a
vector's product with the prompt's last state. `weighted: true` is not in the paper: it adds the selector's
log-probability of a task to the scores of its classes, so that a selector which is sure decides alone.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches, keep, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import without
from luthier.methods.stages.curate.task_names import name_answer
from luthier.model.load import tensors_of
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("routed_accuracy", "accuracy of the selected modules", unit="%", better="higher"),
        Metric("selector_accuracy", "accuracy of the selector", unit="%", better="higher"),
    ],
    paper="arXiv:2309.14763",
    row="conpet",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="tasks with classes of their own have a module each, and the input does not say which task it is"
    " of; plan `conpet` sets it by itself.",
    costs="a forward pass over the names of all tasks for each held-out row, and one over the classes of each"
    " selected task.",
    covers="the selector, its first k modules, scores of all their classes side by side, accuracy over all"
    " rows and by task.",
    omits="classes that no held-out row has, modules of different tuners, generation.",
    tests=[
        "methods/evaluators/quality/test_task_modules.py::test_with_one_module_it_is_hard_routing",
        "methods/evaluators/quality/test_task_modules.py::test_of_all_modules_the_best_class_wins",
        "methods/evaluators/quality/test_task_modules.py::test_a_perfect_selector_is_the_oracle",
    ],
)
class TaskModules(Evaluator):
    """`routed_accuracy` and `selector_accuracy` over held-out rows of these tasks, and
    `routed_accuracy/NAME` of each task. Where all modules are asked without weights there is no selector.
    """

    modules: dict[str, str | None]  # folder of each task's run; null: the policy itself has learned the task
    top_k: Annotated[int, Field(ge=1)] = 6  # modules that answer
    weighted: bool = False  # whether scores add the selector's log-probability of their task
    column: str = "source"  # column that names the task of a row
    batch_size: Annotated[int, Field(ge=1)] | None = None  # rows read at once; by default as many as fit

    @torch.no_grad()
    def run(self, roles, rows, folder, when):
        rows = [row for row in liked(rows) if str(row.get(self.column)) in self.modules]
        if when == "during" or not rows:
            return {}
        right: dict[str, dict[str, float]] = defaultdict(dict)
        selects = self.weighted or self.top_k < len(self.modules)
        tasks = self.selector(roles, rows) if selects else {}
        answers = self.answers(roles, rows, tasks)
        names = list(self.modules)
        for row in rows:
            key, name = str(row["id"]), str(row[self.column])
            value = float(answers[key] == label(row))
            right["routed_accuracy"][key] = value
            right[f"routed_accuracy/{name}"][key] = value
            if selects:
                right["selector_accuracy"][key] = float(names[int(tasks[key].argmax())] == name)
        keep(folder, when, **right)
        return {metric: sum(values.values()) / len(values) for metric, values in right.items()}

    def selector(self, roles: Any, rows: Sequence[dict]) -> dict[str, Tensor]:
        """Row id -> [tasks] log-probabilities of the tasks, among each other."""
        named = []
        for row in rows:
            named.append({**without(row), "completions": [name_answer(row, name) for name in self.modules]})
        scores = sums(roles, roles.policy, named, self.batch_size)
        return {key: values.log_softmax(0) for key, values in scores.items()}

    def answers(self, roles: Any, rows: Sequence[dict], tasks: dict[str, Tensor]) -> dict[str, str]:
        """Row id -> the label of the best class of its modules. tasks: none where all modules answer."""
        best: dict[str, tuple[float, str]] = {}
        for place, (name, run) in enumerate(self.modules.items()):
            options = {label(row): row["completions"][0] for row in rows if str(row[self.column]) == name}
            routed = []
            for row in rows:
                if not tasks or place in tasks[str(row["id"])].topk(self.count).indices:
                    routed.append({**without(row), "completions": list(options.values())})
            if not options or not routed:
                continue
            policy = roles.policy
            if run is not None:
                tensors = tensors_of(run, policy.attached)
                policy = policy.as_role(f"module {name}", partial(policy.attached.using, tensors))
            for key, values in sums(roles, policy, routed, self.batch_size).items():
                if self.weighted:
                    values = values + tasks[key][place]
                score, answer = float(values.max()), list(options)[int(values.argmax())]
                if key not in best or score > best[key][0]:
                    best[key] = score, answer
        return {str(row["id"]): best.get(str(row["id"]), (0.0, ""))[1] for row in rows}

    @property
    def count(self) -> int:
        """Modules that answer."""
        return min(self.top_k, len(self.modules))


def label(row: dict) -> str:
    """A row's class: its completion as text."""
    completion = row["completions"][0]
    return completion if isinstance(completion, str) else json.dumps(completion)


def sums(roles: Any, policy: Any, rows: Sequence[dict], size: int | None) -> dict[str, Tensor]:
    """Row id -> [completions] log-probability of each."""
    out = {}
    for batch in batches(roles, rows, size):
        values = batch.sums(policy.logprobs(batch).double()).cpu()
        several = values.split([len(row["completions"]) for row in batch.rows])
        for row, part in zip(batch.rows, several, strict=True):
            out[str(row["id"])] = part
    return out
