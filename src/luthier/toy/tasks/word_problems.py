"""Little stories of buying and losing, solved sum by sum. A story is held out when one of its sums is.

Graded by the number of steps and by what does not matter: "distracted" stories count somebody else's things
too. Out of distribution are longer stories ("ood") and larger numbers ("ood_large").
"""

from ._random import Random
from ._sample import join_atoms, sample, sum_atom
from ._words import FRIENDS
from .arithmetic import verify_result

SHARE = 0.1
_KINDS = {"one_step": 0.2, "two_steps": 0.35, "three_steps": 0.25, "distracted": 0.2}
SPLITS = {
    "train": _KINDS,
    "validation": _KINDS,
    "test": _KINDS,
    "ood": {"long": 1},
    "ood_large": {"large": 1},
}
THINGS = "apples coins books stones cards shells beads nuts pens stamps".split()
GAINS = ["{name} buys {k} more.", "A friend brings {k}.", "{name} finds {k}."]
LOSSES = ["{name} gives away {k}.", "{k} get lost."]
STEPS = {
    "one_step": (1,),
    "two_steps": (2,),
    "three_steps": (3,),
    "distracted": (1, 2),
    "long": (4,),
    "large": (1, 2),
}


def draw(random: Random, kind: str) -> dict:
    name, thing = random.choice(FRIENDS), random.choice(THINGS)
    have, most = (random.randint(100, 400), 300) if kind == "large" else (random.randint(3, 40), 30)
    story, sums, atoms = [f"{name} has {have} {thing}."], [], []
    for _ in range(random.choice(STEPS[kind])):
        k = random.randint(most // 2 if kind == "large" else 2, most)
        sign = "-" if k < have and random.random() < 0.5 else "+"
        left = have + k if sign == "+" else have - k
        story.append(random.choice(GAINS if sign == "+" else LOSSES).format(name=name, k=k))
        sums.append(f"{have}{sign}{k}={left}")
        atoms.append(sum_atom(have, sign, k))
        have = left
    if kind == "distracted":
        other = random.choice([friend for friend in FRIENDS if friend != name])
        what = random.choice([other_thing for other_thing in THINGS if other_thing != thing])
        story.insert(random.randint(1, len(story)), f"{other} has {random.randint(2, 40)} {what}.")
    return {
        "prompt": f"Problem: {' '.join(story)} How many {thing}?\nSolution:",
        "completion": f" {'; '.join(sums)}; so {have}",
        "answer": str(have),
        "item": join_atoms(*atoms),
    }


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


verify = verify_result
