"""Invented words that never change: no other pretrained model knows them, and none is in two lists."""

from ._random import Random

_ONSETS = "b d f g k l m n p r s t v z br tr sh th kl".split()
_SYLLABLES = [onset + vowel for onset in _ONSETS for vowel in "aeiou"]
_taken: set[str] = set()


def invent(name: str, count: int, syllables: int, ending: str = "") -> list[str]:
    """`count` fresh words, drawn from `name` alone (and never one that an earlier list holds)."""
    random, words = Random(f"words/{name}"), []
    while len(words) < count:
        word = "".join(random.choice(_SYLLABLES) for _ in range(syllables)) + ending
        if word not in _taken:
            _taken.add(word)
            words.append(word)
    return words


def _half_each(first: list[str], second: list[str]) -> tuple[list[str], list[str]]:
    """Two classes in which both endings occur equally, so that an ending does not give the class away."""
    half = len(first) // 2
    return first[:half] + second[:half], first[half:] + second[half:]


FIRST_NAMES = [word.capitalize() for word in invent("first names", 90, 2, "n")]
LAST_NAMES = [word.capitalize() for word in invent("last names", 120, 2, "sk")]
TOWNS = [word.capitalize() for word in invent("towns", 40, 2, "burg")]
GOOD, BAD = _half_each(invent("qualities ic", 48, 3, "ic"), invent("qualities ous", 48, 3, "ous"))
TOPICS = {topic: invent(topic, 30, 2, "l") for topic in ("sport", "music", "cooking", "travel")}
THINGS = [word for words in TOPICS.values() for word in words]
ZORIAN = invent("zorian", 28, 2)
VELMI = invent("velmi", 28, 2)

FRIENDS = "Ann Bob Cara Dan Eve Finn Gus Hana Ivo Jane".split()

# Later lists come last: a word is taken once, so the order of the lists above may not change.
KELU = invent("kelu", 28, 2)
LABELS = {
    label: invent(f"label {label}", 10, 2, "x") for label in ("money", "travel", "health", "work", "family")
}
CLASSES = [invent(f"class {i}", 12, 2, "p") for i in range(18)]
DOMAINS = [(invent(f"domain {i} good", 12, 2, "f"), invent(f"domain {i} bad", 12, 2, "f")) for i in range(5)]
PLACES = [word.capitalize() for word in invent("places", 40, 2, "via")]
FIRMS = [word.capitalize() for word in invent("firms", 40, 2, "corp")]
FOLK = (
    [word.capitalize() for word in invent("folk", 80, 2)],
    [word.capitalize() for word in invent("clans", 80, 2, "t")],
)
