"""Three made-up languages with translation pairs: Zorian is pretrained, Kelu a little, Velmi is left for
tuning.

Zorian says subject, object, verb, with the adjective after its noun and "mi" for many. Kelu says object,
verb, subject, with the adjective first, "so" for many and "ra" at the end of the subject. Velmi says verb,
subject, object, with the adjective first and "ka" for many. "ood" holds adjectives beside nouns they never
met. In "switched" sentences some words of the Zorian are English (code-switching); pretraining turns them
into English, and the splits "switch" and "switch_test" ask for them to be written.
"""

from ._random import Random
from ._sample import sample, slots
from ._words import KELU, VELMI, ZORIAN

SHARE = 0.05
_KINDS = {"to_zorian": 0.5, "from_zorian": 0.2, "to_kelu": 0.18, "switched": 0.12}
SPLITS = {
    "train": _KINDS,
    "validation": _KINDS,
    "test": _KINDS,
    "ood": {"new_pair": 1},
    "new": {"to_velmi": 1},
    "new_test": {"to_velmi": 1},
    "switch": {"to_switched": 1},
    "switch_test": {"to_switched": 1},
}
NOUNS: list[str] = [*"king bird river child stone house tree horse wolf ship star cloud".split()]
ADJECTIVES: list[str] = [*"old red small quiet brave dark golden cold".split()]
VERBS: list[str] = [*"sees finds follows loves hides calls takes fears".split()]
_ENGLISH = NOUNS + ADJECTIVES + VERBS
TO_ZORIAN = dict(zip(_ENGLISH, ZORIAN, strict=True))
TO_VELMI = dict(zip(_ENGLISH, VELMI, strict=True))
TO_KELU = dict(zip(_ENGLISH, KELU, strict=True))

Phrase = tuple[str, str, bool]  # noun, adjective or "", many?


def is_new_pair(adjective: str, noun: str) -> bool:
    """Pairs of adjective and noun that pretraining never shows (one of six)."""
    return bool(adjective) and (5 * ADJECTIVES.index(adjective) + NOUNS.index(noun)) % 6 == 0


def english(phrase: Phrase) -> str:
    noun, adjective, many = phrase
    return " ".join(word for word in ("the", adjective, noun + "s" * many) if word)


def zorian(phrase: Phrase) -> str:
    noun, adjective, many = phrase
    word = TO_ZORIAN[noun] + "mi" * many
    return f"{word} {TO_ZORIAN[adjective]}" if adjective else word


def velmi(phrase: Phrase) -> str:
    noun, adjective, many = phrase
    word = TO_VELMI[noun] + "ka" * many
    return f"{TO_VELMI[adjective]} {word}" if adjective else word


def kelu(phrase: Phrase, subject: bool) -> str:
    noun, adjective, many = phrase
    word = TO_KELU[noun] + "so" * many + "ra" * subject
    return f"{TO_KELU[adjective]} {word}" if adjective else word


def switched(phrase: Phrase) -> str:
    """Zorian, but for the noun."""
    noun, adjective, many = phrase
    word = noun + "s" * many
    return f"{word} {TO_ZORIAN[adjective]}" if adjective else word


def _phrase(random: Random) -> Phrase:
    adjective = random.choice(ADJECTIVES) if random.random() < 0.6 else ""
    return random.choice(NOUNS), adjective, random.random() < 0.3


def draw(random: Random, kind: str) -> dict:
    while True:
        subject, verb, thing = _phrase(random), random.choice(VERBS), _phrase(random)
        is_new = any(is_new_pair(adjective, noun) for noun, adjective, _ in (subject, thing))
        if is_new == (kind == "new_pair"):
            break
    source = f"{english(subject)} {verb} {english(thing)}"
    if kind == "to_velmi":
        return _translation(
            "English", source, "Velmi", f"{TO_VELMI[verb]} {velmi(subject)} {velmi(thing)}", source
        )
    if kind == "to_kelu":
        return _translation(
            "English", source, "Kelu", f"{kelu(thing, False)} {TO_KELU[verb]} {kelu(subject, True)}", source
        )
    if kind in ("switched", "to_switched"):
        mixed = f"{switched(subject)} {switched(thing)} {TO_ZORIAN[verb]}"
        if kind == "switched":
            return _translation("Mixed", mixed, "English", source, source)
        return _translation("English", source, "Mixed", mixed, source)
    target = f"{zorian(subject)} {zorian(thing)} {TO_ZORIAN[verb]}"
    if kind == "from_zorian":
        return _translation("Zorian", target, "English", source, source)
    return _translation("English", source, "Zorian", target, "!" + source if is_new else source)


def _translation(source_language: str, source: str, target_language: str, target: str, item: str) -> dict:
    return {
        "prompt": f"{source_language}: {source}\n{target_language}:",
        "completion": f" {target}",
        "answer": target,
        "item": item,
    }


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


verify = slots
