"""What is a text about? An item is a pair of things; "ood" words the text otherwise."""

from ._random import Random
from ._sample import same_text, sample
from ._words import BAD, GOOD, TOPICS

SHARE = 0.02
SPLITS = {
    "train": {"text": 1},
    "validation": {"text": 1},
    "test": {"text": 1},
    "ood": {"other_words": 1},
}
TEXTS = {
    "text": [
        "the {one} near the {other} was {quality}.",
        "we talked about a {quality} {one} and a {other}.",
        "{other}, {one} and more: {quality}!",
    ],
    "other_words": ["no {other} without a {quality} {one}."],
}


def draw(random: Random, kind: str) -> dict:
    topic = random.choice(list(TOPICS))
    one, other = random.sample(TOPICS[topic], 2)
    text = random.choice(TEXTS[kind]).format(one=one, other=other, quality=random.choice(GOOD + BAD))
    return {
        "prompt": f"Text: {text}\nTopic:",
        "completion": f" {topic}",
        "answer": topic,
        "item": " ".join(sorted((one, other))),
    }


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


verify = same_text
