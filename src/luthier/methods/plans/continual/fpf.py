"""k-FPF: a stream of tasks without replay in every step, and from time to time a short training of those few
tensors that forget, on a memory of all tasks.

How much a tensor forgets is told by how far its numbers went from the end of one task to that of the next:
the mean of |change| over its numbers and over tasks. In a repair the most sensitive tensors, up to a share of
all numbers, learn the memory, and all others rest: the learning rate of their updates is 0 (Zhao et al.,
2023). With `rounds: 1` this is FPF, once behind the last task; with `rounds: 0` it is plan `continual`.

Departs: the k rounds lie behind tasks, evenly, where the paper's lie at equal numbers of steps whatever the
task; none follows the first task, when nothing is forgotten yet. The memory is a random sample with equal
parts of each task, not a reservoir.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.plans.continual.continual import Continual
from luthier.registry import plan
from luthier.storage import checkpoints

Change = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # tensors at the end of a task, and of the next


@plan(
    paper="arXiv:2304.04158",
    row="k-fpf",
    use_when="tasks come one after the other and you keep some rows of each, but replay in every step is too"
    " dear.",
    costs="the stream, and `steps` more for each round, in which few tensors move.",
    covers="sensitivity by the change across tasks, the most sensitive tensors under a budget, FPF behind any"
    " stream (also one with replay) and k-FPF.",
    omits="sensitivity by gradients and the comparison with changes within a task; statistics of batch norms;"
    " k-FPF-KD with stored logits.",
    tests=[
        "methods/plans/continual/test_fpf.py::test_the_tensors_that_went_far_are_chosen_within_the_budget",
        "methods/plans/continual/test_fpf.py::test_rounds_lie_evenly_and_none_is_the_plain_stream",
        "methods/plans/continual/test_fpf.py::test_in_a_repair_the_chosen_tensors_alone_move",
        "methods/plans/continual/test_fpf.py::test_it_repairs_what_a_stream_forgot",
    ],
)
class FPF(Continual):
    """Runs of plan `continual`, with a repair behind some of them. The matrix is that after the repairs."""

    rounds: Annotated[int, Field(ge=0)] = 1  # repairs; the last one follows the last task
    memory: Annotated[int, Field(ge=1)] = 200  # rows that a repair reads, equally many of each task so far
    steps: Annotated[int, Field(ge=1)] = 300  # of a repair
    share: Annotated[float, Field(gt=0, le=1)] = 0.1  # of the trained numbers that a repair may move

    def __post_init__(self):
        super().__post_init__()
        if self.rounds > len(self.tasks):
            raise RecipeError("rounds: there cannot be more repairs than tasks")

    def recipes(self, recipe):
        count, ends, changes = len(self.tasks), [], []
        due = {math.ceil(k * count / self.rounds) - 1 for k in range(1, self.rounds + 1)} - {0}
        for place in range(count):
            report = yield self.run_of(recipe, place, ends)
            if ends:
                changes.append((ends[-1].folder, report.folder))
            if place in due:
                report = yield self.repair(recipe, place, report, changes)
            ends.append(report)
        self.summarize(ends)
        return ends[-1]

    def repair(self, recipe: Any, place: int, report: Any, changes: Sequence[tuple[str, str]]) -> Any:
        """The recipe that trains the sensitive tensors on the memory, from where a run ended."""
        names, parts = self.tasks[: place + 1], place + 1
        counts = {}
        for k, name in enumerate(names):
            counts[name] = self.memory // parts + (k < self.memory % parts)
        rates: dict[str, float] = {"default": recipe.learning_rate}
        states = [(last_tensors(before), last_tensors(after)) for before, after in changes]
        if all(before and after for before, after in states):  # there are none in a dry run
            chosen = sensitive(states, self.share)
            rates |= {name: 0.0 for name in states[-1][1] if name not in chosen}
        rates |= {name: rate for name, rate in recipe.learning_rates.items() if name not in rates}
        run = self.measured(recipe, counts)
        return run.but(init_from=report.folder, max_steps=self.steps, learning_rate=rates)


def last_tensors(folder: str) -> dict[str, Tensor]:
    """What a run ended with; nothing where it stored nothing."""
    paths = checkpoints.paths(Path(folder))
    return checkpoints.load(paths[-1]).tensors if paths else {}


def sensitivities(changes: Sequence[Change]) -> dict[str, float]:
    """Of each tensor: the mean of |after - before| over its numbers and the changes."""
    out: dict[str, float] = {}
    for before, after in changes:
        for name, tensor in after.items():
            if name not in before or not tensor.is_floating_point():
                continue
            change = (tensor.double() - before[name].double()).abs().mean()
            out[name] = out.get(name, 0.0) + float(change) / len(changes)
    return out


def sensitive(changes: Sequence[Change], share: float) -> set[str]:
    """The most sensitive tensors, as many as fit into a share of all numbers, and at least one."""
    scores, sizes = sensitivities(changes), {name: t.numel() for name, t in changes[-1][1].items()}
    budget = share * sum(sizes[name] for name in scores)
    chosen: set[str] = set()
    for name in sorted(scores, key=lambda name: (-scores[name], name)):
        if not chosen or sizes[name] <= budget:
            chosen.add(name)
            budget -= sizes[name]
    return chosen
