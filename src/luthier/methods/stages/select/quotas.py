"""Rows of each task (a column) up to a cap, and so many general rows beside them that they are a share of
all.

The mixture of SciRIFF's tuning: at most 1,000 rows of each science task, and about as many rows of general
instructions, so that general skill is not forgotten. A smaller quota is part of a larger one: the rows of a
task are drawn in one order, whatever the quota.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import field
from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.stages._base import Stage
from luthier.registry import stage


@stage(
    paper="arXiv:2406.07835",
    row="sciriff",
    use_when="rows of several tasks are mixed and each should have so many rows, or general rows are to keep"
    " a share of the whole.",
    costs="nothing.",
    covers="the mixture: a cap for each task, a share of general rows; answers as JSON against a schema are"
    " scored by reward `json_schema`, spans and lists by `f1`.",
    omits="the 54 tasks' own templates and the judge of long answers; that general rows reduce forgetting is"
    " to be measured by evaluator `forgetting`.",
    tests=[
        "methods/stages/select/test_quotas.py::test_caps_and_the_share_of_general_rows",
        "methods/stages/select/test_quotas.py::test_smaller_quotas_are_part_of_larger_ones",
    ],
)
class Quotas(Stage):
    """At most `cap` rows of each task, or as many as `counts` says; the others leave."""

    asks_model = False

    column: str = "source"  # column that says which task a row is of; without it all are of one
    # rows of a task
    counts: dict[str, Annotated[int, Field(ge=0)]] = field(default_factory=dict)
    cap: Annotated[int, Field(ge=0)] = 1000  # rows of every task that `counts` does not name
    general: str | None = None  # the task whose rows are a share of all, whatever the cap
    share: Annotated[float, Field(ge=0, lt=1)] = 0.5  # which share these are, where there are enough
    draw: int = 0  # number of the draw; another one gives other rows

    def __call__(self, rows, roles):
        rows, tasks = list(rows), defaultdict(list)
        for place, row in enumerate(rows):
            tasks[str(row.get(self.column))].append(place)
        quotas = {name: self.counts.get(name, self.cap) for name in tasks}
        if self.general in tasks:
            others = sum(min(quotas[name], len(tasks[name])) for name in tasks if name != self.general)
            quotas[self.general] = round(self.share / (1 - self.share) * others)
        chosen = []
        for name, places in tasks.items():
            rng = roles.clock.rng("quotas", name, self.draw, at=0)
            order = torch.randperm(len(places), generator=rng).tolist()
            chosen += [places[k] for k in order[: quotas[name]]]
        return self.drop(roles, rows, chosen, f"their {self.column} has its quota")
