"""Is a review positive or negative? An item is a pair of qualities; "ood" words the review otherwise."""

from ._random import Random
from ._sample import same_text, sample
from ._words import BAD, GOOD, THINGS

SHARE = 0.02
SPLITS = {
    "train": {"review": 1},
    "validation": {"review": 1},
    "test": {"review": 1},
    "ood": {"other_words": 1},
}
REVIEWS = {
    "review": [
        "the {thing} was {a} and {b}.",
        "i found the {thing} quite {a}, even {b}.",
        "what a {a} {thing}! so {b}.",
        "our {thing} is {a} but also {b}.",
    ],
    "other_words": ["honestly, {a} and {b}: that is the {thing}.", "they call this {thing} {b}; i say {a}."],
}


def pair_atom(a: str, b: str) -> str:
    return " ".join(sorted((a, b)))


def draw(random: Random, kind: str) -> dict:
    answer = random.choice(("positive", "negative"))
    a, b = random.sample(GOOD if answer == "positive" else BAD, 2)
    review = random.choice(REVIEWS[kind]).format(thing=random.choice(THINGS), a=a, b=b)
    return {
        "prompt": f"Review: {review}\nSentiment:",
        "completion": f" {answer}",
        "answer": answer,
        "item": pair_atom(a, b),
    }


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


verify = same_text
