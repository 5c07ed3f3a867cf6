"""Does a premise entail a hypothesis: yes, no, or maybe?

Graded: in "fact" rows the hypothesis repeats or denies half of the premise, in "chain" rows it follows from
two comparisons, and from three in "ood". An item is a premise, whatever the order of its halves.
"""

from ._random import Random
from ._sample import same_text, sample
from ._words import FRIENDS

SHARE = 0.03
_KINDS = {"fact": 0.45, "chain": 0.55}
SPLITS = {
    "train": _KINDS,
    "validation": _KINDS,
    "test": _KINDS,
    "ood": {"long_chain": 1},
}
NOUNS = "king bird river child stone house tree horse wolf ship star cloud".split()
STATES = "wet warm clean broken heavy lost empty near".split()
RELATIONS = {"taller": "shorter", "older": "younger", "faster": "slower", "richer": "poorer"}


def draw(random: Random, kind: str) -> dict:
    answer = random.choice(("yes", "no", "maybe"))
    if kind == "fact":
        premise, hypothesis, item = _fact(random, answer)
    else:
        premise, hypothesis, item = _chain(random, answer, 4 if kind == "long_chain" else 3)
    return {
        "prompt": f"Premise: {premise}\nHypothesis: {hypothesis}\nEntailed:",
        "completion": f" {answer}",
        "answer": answer,
        "item": item,
    }


def _fact(random: Random, answer: str) -> tuple[str, str, str]:
    (one, other), (this, that) = random.sample(NOUNS, 2), random.sample(STATES, 2)
    premise = f"the {one} is {this} and the {other} is {that}."
    noun, state = random.choice(((one, this), (other, that)))
    if answer == "maybe":
        state = random.choice([s for s in STATES if s not in (this, that)])
    # "not" says neither yes nor no by itself: what is unknown stays unknown when it is denied
    denied = answer == "no" or answer == "maybe" and random.random() < 0.5
    return (
        premise,
        f"the {noun} is{' not' * denied} {state}.",
        " ".join(sorted((f"{one} {this}", f"{other} {that}"))),
    )


def _chain(random: Random, answer: str, count: int) -> tuple[str, str, str]:
    """Names in a row, each more than the next; the hypothesis compares two that no sentence compares."""
    names, more = random.sample(FRIENDS, count + 1), random.choice(list(RELATIONS))
    *row, stranger = names
    sentences = [f"{a} is {more} than {b}." for a, b in zip(row, row[1:], strict=False)]
    random.shuffle(sentences)
    first, last = row[0], row[-1]
    if answer == "maybe":
        first, last = random.choice(((stranger, last), (first, stranger)))
        first, last = random.choice(((first, last), (last, first)))
    word = more
    if answer == "no":
        first, last = last, first
    if random.random() < 0.4:  # the same said from the other end
        first, last, word = last, first, RELATIONS[more]
    return " ".join(sentences), f"{first} is {word} than {last}.", f"{more} {' '.join(row)}"


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


verify = same_text
