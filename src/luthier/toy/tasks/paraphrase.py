"""Paraphrases: do two sentences mean the same ("same"), and another wording of one ("rewrite").

The second sentence turns the first into the passive, swaps adjectives for their synonyms, or both; the wrong
ones also swap who does it with whom, or an adjective for another. An item is who does what to whom; "ood" has
both changes.
"""

from ._random import Random
from ._sample import same_text, sample
from .language import NOUNS

SHARE = 0.025
_KINDS = {"same": 0.7, "rewrite": 0.3}
SPLITS = {
    "train": _KINDS,
    "validation": _KINDS,
    "test": _KINDS,
    "ood": {"both_changes": 1},
}
VERBS = {
    "sees": "seen",
    "finds": "found",
    "follows": "followed",
    "loves": "loved",
    "hides": "hidden",
    "calls": "called",
}
SYNONYMS = {
    "big": "large",
    "tiny": "little",
    "fast": "quick",
    "glad": "happy",
    "silent": "mute",
    "odd": "strange",
}

Noun = tuple[str, str]  # adjective, noun


def draw(random: Random, kind: str) -> dict:
    (one, other), verb = random.sample(NOUNS, 2), random.choice(list(VERBS))
    who, whom = (random.choice(list(SYNONYMS)), one), (random.choice(list(SYNONYMS)), other)
    item = f"{one} {verb} {other}"
    sentence = active(who, verb, whom)
    if kind == "rewrite":
        answer = passive(who, verb, whom)
        return _row(f"Active: {sentence}\nPassive:", answer, item)
    answer = random.choice(("yes", "no"))
    turned, renamed = random.choice(((True, False), (False, True)))
    if kind == "both_changes":
        turned = renamed = True
    if answer == "no":
        if random.random() < 0.5:
            who, whom = whom, who
        else:
            who = random.choice([a for a in SYNONYMS if a != who[0]]), who[1]
    if renamed:
        who, whom = (SYNONYMS[who[0]], who[1]), (SYNONYMS[whom[0]], whom[1])
    return _row(
        f"One: {sentence}\nTwo: {(passive if turned else active)(who, verb, whom)}\nSame:", answer, item
    )


def active(who: Noun, verb: str, whom: Noun) -> str:
    return f"the {' '.join(who)} {verb} the {' '.join(whom)}"


def passive(who: Noun, verb: str, whom: Noun) -> str:
    return f"the {' '.join(whom)} is {VERBS[verb]} by the {' '.join(who)}"


def _row(prompt: str, answer: str, item: str) -> dict:
    return {"prompt": prompt, "completion": f" {answer}", "answer": answer, "item": item}


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


verify = same_text
