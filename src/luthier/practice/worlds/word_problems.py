"""Little stories of buying and losing, solved sum by sum. A story is held out when one of its sums is."""

from random import Random

from ._sample import join_atoms, sample, sum_atom
from ._words import FRIENDS

SHARE = 0.13
SPLITS = {
    "train": {"short": 1},
    "validation": {"short": 1},
    "test": {"short": 1},
    "ood": {"long": 1},
}
THINGS = "apples coins books stones cards shells beads nuts pens stamps".split()
GAINS = ["{name} buys {k} more.", "A friend brings {k}.", "{name} finds {k}."]
LOSSES = ["{name} gives away {k}.", "{k} get lost."]


def draw(random: Random, kind: str) -> dict:
    name, thing, have = random.choice(FRIENDS), random.choice(THINGS), random.randint(3, 40)
    story, sums, atoms = [f"{name} has {have} {thing}."], [], []
    for _ in range(4 if kind == "long" else random.choice((1, 2, 2, 3))):
        k = random.randint(2, 30)
        sign = "-" if k < have and random.random() < 0.5 else "+"
        left = have + k if sign == "+" else have - k
        story.append(random.choice(GAINS if sign == "+" else LOSSES).format(name=name, k=k))
        sums.append(f"{have}{sign}{k}={left}")
        atoms.append(sum_atom(have, sign, k))
        have = left
    return {
        "prompt": f"Problem: {' '.join(story)} How many {thing}?\nSolution:",
        "completion": f" {'; '.join(sums)}; so {have}",
        "answer": str(have),
        "item": join_atoms(*atoms),
    }


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)
