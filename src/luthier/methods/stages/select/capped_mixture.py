"""Draws rows from several tasks in proportion to their sizes, none of which counts more than a cap, so that
large tasks do not crowd out small ones.
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Annotated

from pydantic import Field

from luthier.methods.stages._base import Stage
from luthier.registry import stage


@stage(
    paper="arXiv:1910.10683",
    use_when="rows of many tasks of very different sizes are trained on together.",
    costs="nothing.",
    covers="examples-proportional mixing with a cap, by weights of your own where you have them.",
    row="flame-autorater",
    tests=["methods/stages/select/test_capped_mixture.py::test_rates_are_those_of_capped_sizes"],
)
class CappedMixture(Stage):
    """As many rows as there are, or `rows`. A task's rows are all drawn before one is drawn again."""

    asks_model = False

    task: str = "task"  # column that says which task a row is of; without it all are of one
    cap: Annotated[int, Field(ge=1)] = 65536  # rows that a task counts at most
    rows: Annotated[int, Field(ge=1)] | None = None  # rows that are drawn
    weights: dict[str, float] | None = None  # a factor for the size of each task; 1 where it is not named

    def __call__(self, rows, roles):
        rows, tasks = list(rows), defaultdict(list)
        for row in rows:
            tasks[str(row.get(self.task))].append(row)
        names, chance = sorted(tasks), random.Random(roles.clock.derive_seed("capped_mixture"))
        factors = self.weights or {}
        sizes = [factors.get(name, 1.0) * min(len(tasks[name]), self.cap) for name in names]
        decks: dict[str, list[dict]] = {name: [] for name in names}
        counts: dict[str, int] = defaultdict(int)
        out = []
        for name in chance.choices(names, sizes, k=self.rows or len(rows)):
            if not decks[name]:
                decks[name] = chance.sample(tasks[name], len(tasks[name]))
            row = decks[name].pop()
            times = counts[row["id"]]
            counts[row["id"]] += 1
            # ids stay different where a row is drawn again
            out.append({**row, "id": f"{row['id']}/{times}"} if times else row)
        return out
