"""One plain sentence said formally or casually; a third style, "pirate", is left for tuning.

Without a tag the result is formal; in the splits "preference" and "unpaired" the casual wording is the one that is liked. Each word of time has its own wording in each style: words that are always
interchangeable would end as one vector in a small model, which could then never copy them apart.
"""

from random import Random

from ._sample import sample

SHARE = 0.04
_KINDS = {"formal": 1, "casual": 1, "plain": 1}
SPLITS = {
    "train": _KINDS,
    "validation": _KINDS,
    "test": _KINDS,
    "ood": {"new_pair": 1},
    "new": {"pirate": 1},
    "new_test": {"pirate": 1},
    "preference": {"casual_liked": 1},
    "preference_test": {"casual_liked": 1},
    "unpaired": {"judged": 1},
    "unpaired_test": {"judged": 1},
}
WHO: list[str] = [*"doctor teacher captain neighbor gardener student guard clerk merchant driver".split()]
DOES: list[str] = [*"opens cleans paints repairs sells carries watches moves counts washes guards builds".split()]
WHAT = "door table wall clock boat basket garden ladder barrel window bridge fence".split()
WHEN = {
    "today": ("on this day", "2day", "afore sundown"),
    "tonight": ("this evening", "2nite", "by moonlight"),
    "tomorrow": ("on the following day", "tmrw", "at next tide"),
    "now": ("at present", "rn", "this very bell"),
    "soon": ("before long", "in a sec", "ere the wind turns"),
    "again": ("once more", "one more time", "for another voyage"),
}


def formal(who: str, does: str, what: str, when: str) -> str:
    return f"It is hereby noted that the {who} kindly {does} the {what} {WHEN[when][0]}."


def casual(who: str, does: str, what: str, when: str) -> str:
    return f"yo, that {who} totally {does} the {what} {WHEN[when][1]}, lol"


def pirate(who: str, does: str, what: str, when: str) -> str:
    return f"Arr, the {who} {does} the {what} {WHEN[when][2]}, matey!"


STYLES = {"formal": formal, "casual": casual, "plain": formal, "pirate": pirate}


def is_new_pair(who: str, does: str) -> bool:
    """Who never does what in pretraining (one pair of eight)."""
    return (3 * WHO.index(who) + DOES.index(does)) % 8 == 0


def draw(random: Random, kind: str) -> dict:
    who, does = random.choice(WHO), random.choice(DOES)
    while is_new_pair(who, does) != (kind == "new_pair"):
        who, does = random.choice(WHO), random.choice(DOES)
    words = who, does, random.choice(WHAT), random.choice(list(WHEN))
    style = random.choice(("formal", "casual")) if kind == "new_pair" else kind
    item = {"item": ("!" if kind == "new_pair" else "") + " ".join(words)}
    if kind == "casual_liked":
        return {"prompt": asked("", words), "chosen": f" {casual(*words)}", "rejected": f" {formal(*words)}", **item}
    if kind == "judged":
        good = random.random() < 0.5
        return {"prompt": asked("", words), "completion": f" {(casual if good else formal)(*words)}", "label": good, **item}
    answer = STYLES[style](*words)
    tag = "" if style == "plain" else f" ({style})"
    return {"prompt": asked(tag, words), "completion": f" {answer}", "answer": answer, **item}


def asked(tag: str, words: tuple[str, ...]) -> str:
    return f"Say{tag}: the {words[0]} {words[1]} the {words[2]} {words[3]}\nResult:"


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)
