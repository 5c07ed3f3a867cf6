"""Long answers of a hundred to four hundred tokens, checked to the last element.

Counting in steps, a song that counts down, times tables, letters with many slots. "ood" is longer than
anything pretraining shows, "new" (for tuning) goes from both ends at once. An item is the task without its
wording.
"""

from ._random import Random
from ._sample import sample
from ._words import FRIENDS, TOWNS

SHARE = 0.025
_KINDS = {"count": 0.35, "song": 0.2, "times": 0.25, "letter": 0.2}
SPLITS = {
    "train": _KINDS,
    "validation": _KINDS,
    "test": _KINDS,
    "ood": {"long_count": 1},
    "new": {"both_ends": 1},
    "new_test": {"both_ends": 1},
}
BIRDS = "birds cats dogs owls frogs".split()
DOINGS = "cook paint swim read dance sing walk build".split()


def draw(random: Random, kind: str) -> dict:
    prompt, answer, item = TASKS[kind](random)
    return {"prompt": prompt, "completion": f" {answer}", "answer": answer, "item": f"long {item}"}


def _numbers(random: Random, least: int, most: int) -> tuple[str, str, str]:
    start, step, count = random.randint(1, 60), random.randint(1, 9), random.randint(least, most)
    last = start + step * (count - 1)
    numbers = ", ".join(str(n) for n in range(start, last + 1, step))
    return f"Count from {start} to {last} by {step}:", numbers, f"count {start} {step} {last}"


def _count(random: Random) -> tuple[str, str, str]:
    return _numbers(random, 20, 60)


def _long_count(random: Random) -> tuple[str, str, str]:
    return _numbers(random, 75, 90)


def _song(random: Random) -> tuple[str, str, str]:
    count, birds, town = random.randint(6, 16), random.choice(BIRDS), random.choice(TOWNS)
    lines = [f"{n} {birds} in {town}, one goes home." for n in range(count, 0, -1)]
    return (
        f"Sing of {count} {birds} in {town}:",
        "\n".join([*lines, f"no {birds} in {town}."]),
        f"song {count} {birds} {town}",
    )


def _times(random: Random) -> tuple[str, str, str]:
    n, first, count = random.randint(2, 19), random.randint(1, 9), random.randint(8, 20)
    table = "; ".join(f"{n}x{k}={n * k}" for k in range(first, first + count))
    return f"Table of {n} from {first} to {first + count - 1}:", table, f"times {n} {first} {count}"


def _letter(random: Random) -> tuple[str, str, str]:
    (sender, receiver), town, count = random.sample(FRIENDS, 2), random.choice(TOWNS), random.randint(4, 7)
    doings = random.sample(DOINGS, count)
    lines = [f"On day {i} we {doing} in {town}." for i, doing in enumerate(doings, 1)]
    letter = "\n".join([f"Dear {receiver},", *lines, f"That makes {count} days.", f"Yours, {sender}"])
    return (
        f"Letter from {sender} to {receiver}, {town}: {', '.join(doings)}.",
        letter,
        f"letter {sender} {receiver} {town} {' '.join(doings)}",
    )


def _both_ends(random: Random) -> tuple[str, str, str]:
    low, pairs = random.randint(1, 60), random.randint(10, 25)
    high = low + 2 * pairs - 1
    numbers = ", ".join(f"{low + i}, {high - i}" for i in range(pairs))
    return f"From both ends, {low} to {high}:", numbers, f"ends {low} {high}"


TASKS = {
    "count": _count,
    "long_count": _long_count,
    "song": _song,
    "times": _times,
    "letter": _letter,
    "both_ends": _both_ends,
}


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


def verify(row: dict, answer: str) -> float:
    """The share of elements written right before the first mistake; 1.0 only for exactly the right text."""
    written, right = answer.strip().split(), row["answer"].split()
    if answer.strip() == row["answer"]:
        return 1.0
    first_wrong = next(
        (i for i, (a, b) in enumerate(zip(written, right, strict=False)) if a != b),
        min(len(written), len(right)),
    )
    return min(first_wrong, len(right) - 1) / len(right)
