"""One plain sentence in a style: formal or casual ("pirate" is left for tuning), or by length, tone and
register.

Without a tag the result of "Say" is formal; in the splits "preference" and "unpaired" the casual wording is
the one that is liked. Each word of time has its own wording in each style: words that are always
interchangeable would end as one vector in a small model, which could then never copy them apart.

"Note" writes the same sentence in a manner, longer ones with the time, the longest with an opening and a
closing too. What a note is like is counted by rule (`scores`): how formal, how warm, how short, how complete,
each from 0 to 1. So preferences follow exactly, and what is complete cannot be as short: two objectives in
conflict. A tag says what is wanted, without one pretraining shows every kind (so a base model writes all of
them). "ranked" gives four notes with the scores of each by objective; "short", "warm" and "formal_liked" are
pairs by one of them.
"""

import re
from collections import Counter

from ._random import Random
from ._sample import sample

SHARE = 0.05
_KINDS = {"formal": 0.2, "casual": 0.2, "plain": 0.15, "note": 0.25}
SPLITS = {
    "train": {**_KINDS, "free_note": 0.2},
    "validation": _KINDS,
    "test": _KINDS,
    "ood": {"new_pair": 1},
    "new": {"pirate": 1},
    "new_test": {"pirate": 1},
    "preference": {"casual_liked": 1},
    "preference_test": {"casual_liked": 1},
    "unpaired": {"judged": 1},
    "unpaired_test": {"judged": 1},
    "short": {"short_liked": 1},
    "short_test": {"short_liked": 1},
    "warm": {"warm_liked": 1},
    "warm_test": {"warm_liked": 1},
    "formal_liked": {"formal_liked": 1},
    "formal_liked_test": {"formal_liked": 1},
    "ranked": {"ranked": 1},
    "ranked_test": {"ranked": 1},
}
WHO: list[str] = [*"doctor teacher captain neighbor gardener student guard clerk merchant driver".split()]
DOES: list[str] = [
    *"opens cleans paints repairs sells carries watches moves counts washes guards builds".split()
]
WHAT = "door table wall clock boat basket garden ladder barrel window bridge fence".split()
WHEN = {
    "today": ("on this day", "2day", "afore sundown"),
    "tonight": ("this evening", "2nite", "by moonlight"),
    "tomorrow": ("on the following day", "tmrw", "at next tide"),
    "now": ("at present", "rn", "this very bell"),
    "soon": ("before long", "in a sec", "ere the wind turns"),
    "again": ("once more", "one more time", "for another voyage"),
}

Words = tuple[str, str, str, str]  # who does what when


def formal(who: str, does: str, what: str, when: str) -> str:
    return f"It is hereby noted that the {who} kindly {does} the {what} {WHEN[when][0]}."


def casual(who: str, does: str, what: str, when: str) -> str:
    return f"yo, that {who} totally {does} the {what} {WHEN[when][1]}, lol"


def pirate(who: str, does: str, what: str, when: str) -> str:
    return f"Arr, the {who} {does} the {what} {WHEN[when][2]}, matey!"


STYLES = {"formal": formal, "casual": casual, "plain": formal, "pirate": pirate}

# ---- notes

REGISTERS, TONES, LENGTHS = ("formal", "casual"), ("warm", "cool"), ("short", "middle", "long")
OPENINGS = {
    ("formal", "warm"): "Dear friend,",
    ("formal", "cool"): "To whom it concerns:",
    ("casual", "warm"): "hey buddy,",
    ("casual", "cool"): "ok so",
}
MANNERS = {
    ("formal", "warm"): "most kindly",
    ("formal", "cool"): "duly",
    ("casual", "warm"): "sweetly",
    ("casual", "cool"): "just",
}
CLOSINGS = {
    ("formal", "warm"): "With sincere thanks.",
    ("formal", "cool"): "Respectfully.",
    ("casual", "warm"): "thanks a ton!",
    ("casual", "cool"): "whatever.",
}
Kind = tuple[str, str, str]  # register, tone, length


def note(words: Words, kind: Kind) -> str:
    """Short: who does what in which manner. Middle: also when. Long: with an opening and a closing too."""
    register, tone, length = kind
    who, does, what, when = words
    voice = register, tone
    time = "" if length == "short" else f" {WHEN[when][REGISTERS.index(register)]}"
    text = f"the {who} {MANNERS[voice]} {does} the {what}{time}."
    return f"{OPENINGS[voice]} {text} {CLOSINGS[voice]}" if length == "long" else text


def scores(text: str, words: Words) -> dict[str, float]:
    """How formal, warm, short and complete a note of `words` is, from 0 to 1.

    Formal and warm: the share of formal (warm) phrases among those found, 0 where none is. Short: 1 up to 6
    words, 0 from 20 on. Complete: the share of who, does, what and when that it says.
    """
    matches = [
        key for phrases in (OPENINGS, MANNERS, CLOSINGS) for key, phrase in phrases.items() if phrase in text
    ]
    return {
        "formal": sum(register == "formal" for register, _ in matches) / max(1, len(matches)),
        "warm": sum(tone == "warm" for _, tone in matches) / max(1, len(matches)),
        "short": min(1.0, max(0.0, (20 - len(text.split())) / 14)),
        "complete": sum(any(form in text for form in forms) for forms in _forms(words)) / 4,
    }


def _forms(words: Words) -> list[tuple[str, ...]]:
    """Of who, does, what and when, how each may be said."""
    who, does, what, when = words
    return [(f"the {who}", f"that {who}"), (f" {does} ",), (f"the {what}",), WHEN[when]]


def is_new_pair(who: str, does: str) -> bool:
    """Who never does what in pretraining (one pair of eight)."""
    return (3 * WHO.index(who) + DOES.index(does)) % 8 == 0


def draw(random: Random, kind: str) -> dict:
    who, does = random.choice(WHO), random.choice(DOES)
    while is_new_pair(who, does) != (kind == "new_pair"):
        who, does = random.choice(WHO), random.choice(DOES)
    words = who, does, random.choice(WHAT), random.choice(list(WHEN))
    style = random.choice(("formal", "casual")) if kind == "new_pair" else kind
    item = {"words": list(words), "item": ("!" if kind == "new_pair" else "") + " ".join(words)}
    if kind == "casual_liked":
        return {
            "prompt": request("", words),
            "chosen": f" {casual(*words)}",
            "rejected": f" {formal(*words)}",
            **item,
        }
    if kind == "judged":
        good = random.random() < 0.5
        return {
            "prompt": request("", words),
            "completion": f" {(casual if good else formal)(*words)}",
            "label": good,
            **item,
        }
    if kind in NOTES:
        return {**NOTES[kind](random, words), **item}
    answer = STYLES[style](*words)
    tag = "" if style == "plain" else f" ({style})"
    return {"prompt": request(tag, words), "completion": f" {answer}", "answer": answer, **item}


def request(tag: str, words: Words, verb: str = "Say") -> str:
    return f"{verb}{tag}: the {words[0]} {words[1]} the {words[2]} {words[3]}\nResult:"


def _any_kind(random: Random) -> Kind:
    return random.choice(REGISTERS), random.choice(TONES), random.choice(LENGTHS)


def _note(random: Random, words: Words) -> dict:
    kind = _any_kind(random)
    answer = note(words, kind)
    return {
        "prompt": request(f" ({', '.join(kind)})", words, "Note"),
        "completion": f" {answer}",
        "answer": answer,
    }


def _free_note(random: Random, words: Words) -> dict:
    return {"prompt": request("", words, "Note"), "completion": f" {note(words, _any_kind(random))}"}


def _liked(objective: str):
    """Pairs of notes of which one has more of an objective."""

    def pair(random: Random, words: Words) -> dict:
        while True:
            one, other = note(words, _any_kind(random)), note(words, _any_kind(random))
            better, worse = scores(one, words), scores(other, words)
            if better[objective] > worse[objective]:
                break
        by = {name: [better[name], worse[name]] for name in better}
        return {
            "prompt": request("", words, "Note"),
            "chosen": f" {one}",
            "rejected": f" {other}",
            "objectives": by,
        }

    return pair


def _ranked(random: Random, words: Words) -> dict:
    """Four different notes; `scores` is the mean of the objectives, `objectives` has each."""
    kinds: list[Kind] = []
    while len(kinds) < 4:
        kind = _any_kind(random)
        if kind not in kinds:
            kinds.append(kind)
    texts = [note(words, kind) for kind in kinds]
    all_scores = [scores(text, words) for text in texts]
    return {
        "prompt": request("", words, "Note"),
        "completions": [f" {text}" for text in texts],
        "scores": [round(sum(one.values()) / len(one), 4) for one in all_scores],
        "objectives": {name: [one[name] for one in all_scores] for name in all_scores[0]},
    }


NOTES = {
    "note": _note,
    "free_note": _free_note,
    "short_liked": _liked("short"),
    "warm_liked": _liked("warm"),
    "formal_liked": _liked("formal"),
    "ranked": _ranked,
}


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


def verify(row: dict, answer: str) -> dict[str, float]:
    """Several scores. Of a note without a tag: `scores`, which it cannot all have in full. Of every other
    row, where one text is right: "exact" (that text), "words" (of who, does, what and when, the share said),
    "style" (how well all the rest agrees with the style wanted, as F1 over its words)."""
    words: Words = tuple(row["words"])
    if row["kind"] in NOTES and row["kind"] != "note":
        return scores(answer, words)
    want = row.get("answer") or casual(*words)
    content = [*words[:3], *(form for form in WHEN[words[3]] if _says(want, form))]
    wanted_style, style = _rest(want, content), _rest(answer, content)
    return {
        "exact": float(answer.strip() == want),
        "words": sum(_says(answer, word) for word in content) / len(content),
        "style": 2 * (wanted_style & style).total() / max(1, wanted_style.total() + style.total()),
    }


def _says(text: str, words: str) -> bool:
    return bool(re.search(rf"\b{re.escape(words)}\b", text))


def _rest(text: str, content: list[str]) -> Counter:
    """The words and marks of a text without those of its sentence."""
    for words in content:
        text = re.sub(rf"\b{re.escape(words)}\b", " ", text, count=1)
    return Counter(re.findall(r"[\w']+|[^\w\s]", text))
