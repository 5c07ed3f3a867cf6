"""Find the people, places and firms in a sentence: as text, and as tokens with BIO tags (`tokens`, `tags`).

Names are invented and occur in no other task; people have one name or two, so that spans have lengths. Items
are the names of people; "ood" words the sentence otherwise.
"""

from collections import Counter

from ._random import Random
from ._sample import join_atoms, sample
from ._words import FIRMS, FOLK, PLACES

SHARE = 0.03
SPLITS = {
    "train": {"text": 1},
    "validation": {"text": 1},
    "test": {"text": 1},
    "ood": {"other_words": 1},
}
TEMPLATES = {
    "text": [
        "{person} moved to {place} .",
        "{person} and {person} work for {firm} .",
        "in {place} {firm} met {person} .",
        "{firm} of {place} grew last year .",
        "{person} sold {firm} to {person} .",
        "the road {street} was closed .",
    ],
    "other_words": ["yesterday {firm} asked {person} about {place} .", "near {place} lives {person} ."],
}
STREETS = [
    f"{way} the {what}"
    for way in "along across behind near".split()
    for what in "river forest market mill harbor bridge".split()
]


def draw(random: Random, kind: str) -> dict:
    tokens, tags, atoms = [], [], []
    for part in random.choice(TEMPLATES[kind]).split():
        what = part.strip("{}")
        words = _words(random, what) if part.startswith("{") else [part]
        named = what in ("person", "place", "firm")
        tokens += words
        tags += [f"B-{what}", *[f"I-{what}"] * (len(words) - 1)] if named else ["O"] * len(words)
        if what in ("person", "street"):
            atoms.append(f"called {' '.join(words)}")
    entities = spans(tokens, tags)
    answer = "; ".join(entities) or "none"
    return {
        "prompt": f"Sentence: {' '.join(tokens)}\nNames:",
        "completion": f" {answer}",
        "answer": answer,
        "tokens": tokens,
        "tags": tags,
        "item": join_atoms(*atoms) or f"called {answer}".replace(";", ","),
    }


def _words(random: Random, what: str) -> list[str]:
    """What fills a slot, as tokens."""
    if what == "person":
        first, last = (random.choice(names) for names in FOLK)
        return [first, last] if random.random() < 0.7 else [first]
    return random.choice({"place": PLACES, "firm": FIRMS, "street": STREETS}[what]).split()


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


def spans(tokens: list[str], tags: list[str]) -> list[str]:
    """BIO tags as the text form has them: "Kelun Bask = person", in order."""
    entities: list[tuple[list[str], str]] = []
    for token, tag in zip(tokens, tags, strict=True):
        if tag.startswith("B-"):
            entities.append(([token], tag[2:]))
        elif tag.startswith("I-") and entities:
            entities[-1][0].append(token)
    return [f"{' '.join(words)} = {what}" for words, what in entities]


def verify(row: dict, answer: str) -> float:
    """F1 of the spans: 1.0 where exactly the right names are given, each with its kind."""
    written, right = (Counter(part.strip() for part in text.split(";")) for text in (answer, row["answer"]))
    return 2 * (written & right).total() / (written.total() + right.total())
