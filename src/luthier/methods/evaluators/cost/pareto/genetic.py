"""Multi-objective optimisation over lists of choices, by NSGA-II with a predictor inside. Lower is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from luthier.methods.searchers._base import pareto_ranks

Genes = tuple[int, ...]
INNER = 24  # generations on guesses, and their size at least


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)


def fronts(costs: Sequence[Sequence[float]]) -> list[list[int]]:
    """Places by rank: the first front is dominated by nobody, the next by the first alone, and so on."""
    rank = pareto_ranks(np.array(costs, float))
    return [np.flatnonzero(rank == r).tolist() for r in range(rank.max() + 1)]


def crowding(costs: Sequence[Sequence[float]], front: Sequence[int]) -> dict[int, float]:
    """How far the neighbours of each member are, over all costs; the ends are infinitely far."""
    room = dict.fromkeys(front, 0.0)
    for k in range(len(costs[0])):
        order = sorted(front, key=lambda i: costs[i][k])
        span = costs[order[-1]][k] - costs[order[0]][k] or 1.0
        room[order[0]] = room[order[-1]] = float("inf")
        for before, here, after in zip(order, order[1:], order[2:]):
            room[here] += (costs[after][k] - costs[before][k]) / span
    return room


def search(
    choices: Sequence[int],
    cost: Callable[[Genes], tuple[float, ...]],
    population: int,
    generations: int,
    rng: torch.Generator,
    start: Sequence[Genes] = (),
) -> dict[Genes, tuple[float, ...]]:
    """NSGA-II: the non-dominated of all that were tried, genes -> costs. choices: how many there are for each
    gene.
    """
    return _front(_evolved(choices, cost, population, generations, rng, start)[1])


def guided(
    choices: Sequence[int],
    cost: Callable[[Genes], tuple[float, ...]],
    guess: Callable[[Mapping[Genes, tuple[float, ...]]], Callable[[Genes], tuple[float, ...]]],
    population: int,
    rounds: int,
    rng: torch.Generator,
    start: Sequence[Genes] = (),
) -> dict[Genes, tuple[float, ...]]:
    """LINAS: as `search`, and no more is measured, but each generation is what NSGA-II finds on guesses from
    all before it.

    guess: from what was measured, what costs are thought to be.
    """
    measured = {g: cost(g) for g in dict.fromkeys([*start, *_drawn(choices, population, rng)])}
    for _ in range(rounds):
        best = _best_first(list(measured), measured)[:population]
        there, _ = _evolved(choices, guess(measured), max(INNER, population), INNER, rng, best)
        new = [g for g in there if g not in measured][:population]  # where these are few, chance fills up
        new += [
            g for g in dict.fromkeys(_drawn(choices, population, rng)) if g not in measured and g not in new
        ][: population - len(new)]
        measured |= {g: cost(g) for g in new}
    return _front(measured)


def _drawn(choices: Sequence[int], n: int, rng: torch.Generator) -> list[Genes]:
    return [tuple(int(torch.randint(of, (), generator=rng)) for of in choices) for _ in range(n)]


def _evolved(
    choices: Sequence[int],
    cost: Callable[[Genes], tuple[float, ...]],
    population: int,
    generations: int,
    rng: torch.Generator,
    start: Sequence[Genes],
) -> tuple[list[Genes], dict[Genes, tuple[float, ...]]]:
    """The last population, best first, and all that was tried."""

    def number(n: int) -> int:
        return int(torch.randint(n, (), generator=rng))

    measured: dict[Genes, tuple[float, ...]] = {}

    def measure(genes: Genes) -> Genes:
        if genes not in measured:
            measured[genes] = cost(genes)
        return genes

    alive = [measure(g) for g in dict.fromkeys([*start, *_drawn(choices, population, rng)])]
    for _ in range(generations):
        alive = _best_first(alive, measured)
        children = []
        for _ in range(population):
            # the better of two
            one, other = (alive[min(number(len(alive)), number(len(alive)))] for _ in range(2))
            child = [a if number(2) else b for a, b in zip(one, other, strict=True)]
            for i, n in enumerate(choices):
                if number(len(choices)) == 0:
                    child[i] = number(n)
            children.append(measure(tuple(child)))
        alive = _best_first(list(dict.fromkeys([*alive, *children])), measured)[:population]
    return alive, measured


def _front(measured: dict[Genes, tuple[float, ...]]) -> dict[Genes, tuple[float, ...]]:
    every = list(measured)
    return {every[i]: measured[every[i]] for i in fronts([measured[g] for g in every])[0]}


def _best_first(alive: Sequence[Genes], measured: dict[Genes, tuple[float, ...]]) -> list[Genes]:
    """By rank, and within a rank those with more room."""
    costs = [measured[g] for g in alive]
    return [
        alive[i]
        for front in fronts(costs)
        for i, _ in sorted(crowding(costs, front).items(), key=lambda x: -x[1])
    ]
