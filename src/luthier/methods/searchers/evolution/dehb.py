"""DEHB: differential evolution inside Hyperband. Each fraction of the steps has a population; mutants come
from the better half of the population below. v = a + factor (b - c), and a child takes each setting from its
parent with `crossover`.

Departs from the paper: the first bracket's survivors resume where they were paused; the population of a
fraction is filled with the first configurations measured there.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from luthier.methods.searchers._base import Suggestion, best_first, rng
from luthier.methods.searchers.bandit._brackets import measured_in
from luthier.methods.searchers.bandit.hyperband import Hyperband
from luthier.registry import searcher


@searcher(
    paper="arXiv:2105.09821",
    row="autorl-hpo",
    use_when="the space has many settings and choices and you can afford many short runs.",
    costs="nothing between runs; paused runs keep their checkpoints.",
    covers="tuning seeds apart from test seeds, the gap between both in the report, DEHB, successive"
    " halving and random search.",
    omits="PB2, BGT and other population-based training, which change settings within a run;"
    " reinforcement-learning environments.",
    tests=[
        "study/test_search.py::test_seeds_that_overlap_are_refused",
        "study/test_search.py::test_one_tuning_seed_flatters_and_five_flatter_less",
        "contracts/test_searchers.py::test_dehb_of_one_share_and_no_crossover_is_the_mutation_alone",
        "contracts/test_searchers.py::test_halving_pays_what_the_formula_says",
    ],
)
class DEHB(Hyperband):
    """With min_share 1 it is differential evolution."""

    factor: Annotated[float, Field(gt=0, le=2)] = 0.5  # mutation factor F
    # share of the settings that a child keeps of its parent; 0: the mutant
    crossover: Annotated[float, Field(ge=0, le=1)] = 0.5
    population: Annotated[int, Field(ge=4)] = 8  # minimum size of a population

    def ask(self, space, history, goals, clock):
        number = 0
        while True:
            for rung, (n, share) in enumerate(self.bracket(number)):
                there = measured_in(history, number, rung)
                if len(there) < n:
                    marks = {"bracket": number, "rung": rung}
                    if number == 0 and rung:
                        below = best_first(measured_in(history, 0, rung - 1))
                        best = next(s for s in below if s.number not in {t.number for t in there})
                        return Suggestion(
                            dict(best.point), share, best.number, {**marks, "slot": best.marks.get("slot")}
                        )
                    return self.child(space, history, clock, share, marks)
            number += 1

    def alive(self, history, share):
        """Slot -> the best that stood in it, at a share."""
        slots = {}
        for s in history:
            slot = s.marks.get("slot")
            if (
                s.share == share
                and slot is not None
                and (slot not in slots or best_first([slots[slot], s])[0] is s)
            ):
                slots[slot] = s
        return slots

    def child(self, space, history, clock, share, marks):
        draw, slots = rng(clock, "ask", len(history)), self.alive(history, share)
        shares = self.shares
        at = min(range(len(shares)), key=lambda i: abs(shares[i] - share))
        below = best_first(list(self.alive(history, shares[max(0, at - 1)]).values()))
        pool = below if at == 0 else below[: max(3, len(below) // 2)]
        pool += [s for s in slots.values() if len(pool) < 3 and s not in pool]
        slot = next((i for i in range(self.population) if i not in slots), len(history) % self.population)
        if (at == 0 and slot not in slots) or len(pool) < 3:
            return Suggestion(space.draw(draw), share, marks={**marks, "slot": slot})
        choice = [pool[i] for i in draw.choice(len(pool), 3, replace=False)]
        a, b, c = (space.encode(s.point) for s in choice)
        mutant = a + self.factor * (b - c)
        outside = (mutant < 0) | (mutant > 1)
        mutant[outside] = draw.random(int(outside.sum()))
        if slot in slots:
            keep = draw.random(len(mutant)) < self.crossover
            keep[draw.integers(len(mutant))] = False
            mutant = np.where(keep, space.encode(slots[slot].point), mutant)
        return Suggestion(
            space.decode(mutant), share, marks={**marks, "slot": slot, "of": [s.number for s in choice]}
        )
