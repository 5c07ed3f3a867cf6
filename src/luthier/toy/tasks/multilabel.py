"""Multi-label classification: which of five labels a message carries, none to three, in alphabetical order.

Each label has ten words of its own; a message mentions one word for each of its labels and plain words
besides. An item is the set of words; "ood" messages carry four labels.
"""

from ._random import Random
from ._sample import sample
from ._words import LABELS

SHARE = 0.02
_KINDS = {"none": 0.1, "one": 0.25, "two": 0.35, "three": 0.3}
SPLITS = {
    "train": _KINDS,
    "validation": _KINDS,
    "test": _KINDS,
    "ood": {"four": 1},
}
COUNT = {"none": 0, "one": 1, "two": 2, "three": 3, "four": 4}
PLAIN = "table window paper morning street corner letter garden bottle pocket".split()
STARTS = ["please look at the", "we spoke about the", "there is news of the", "i wrote down the"]


def draw(random: Random, kind: str) -> dict:
    labels = random.sample(sorted(LABELS), COUNT[kind])
    telling = [random.choice(LABELS[label]) for label in labels]
    plain = random.sample(PLAIN, random.randint(1, 2) if telling else 3)
    words = telling + plain
    random.shuffle(words)
    answer = ", ".join(sorted(labels)) or "none"
    return {
        "prompt": f"Message: {random.choice(STARTS)} {' and the '.join(words)}.\nLabels:",
        "completion": f" {answer}",
        "answer": answer,
        "labels": sorted(labels),
        "item": "labels " + " ".join(sorted(telling or plain)),
    }


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


def verify(row: dict, answer: str) -> float:
    """Labels in common over labels in either (Jaccard), so 1.0 for exactly the right ones; "none" counts as a
    label.
    """
    written, right = (set(text.strip().split(", ")) for text in (answer, row["answer"]))
    return len(written & right) / len(written | right)
