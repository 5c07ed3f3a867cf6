"""A stream of tasks for learning one after the other, with exact labels.

Class-incremental: "task_1" to "task_5" each bring three classes that no task before had, each class with
twelve invented words; "task_1_test", ... ask for them. Domain-incremental: "domain_1" to "domain_4" tell good
from bad, each with words of its own; "domain_1_test", ... ask. Pretraining shows the form with three classes
and one domain that come in no task. An item is the set of telling words.
"""

from ._random import Random
from ._sample import same_text, sample
from ._words import CLASSES, DOMAINS

SHARE = 0.015
TASKS, DOMAIN_TASKS = 5, 4
_KINDS = {"task_0": 1, "domain_0": 1}
SPLITS = {"train": _KINDS, "validation": _KINDS, "test": _KINDS, "ood": {"other_words": 1}}
SPLITS |= {f"task_{i}{end}": {f"task_{i}": 1} for i in range(1, TASKS + 1) for end in ("", "_test")}
SPLITS |= {
    f"domain_{i}{end}": {f"domain_{i}": 1} for i in range(1, DOMAIN_TASKS + 1) for end in ("", "_test")
}
NAMES = (
    "fruit metal cloth wood stone spice dance boat knot lamp coin drum leaf rope soup bell gem hat".split()
)
FORMS = ["the {a} lies by the {b}.", "here are a {a} and a {b}.", "one {a}, one {b}, no more."]
OTHER_FORMS = ["neither {a} nor {b} is missing."]
VERDICTS = ["it felt {a} and {b}.", "they call it {a}, also {b}."]


def draw(random: Random, kind: str) -> dict:
    if kind.startswith("domain"):
        good = random.random() < 0.5
        a, b = random.sample(DOMAINS[int(kind[-1])][0 if good else 1], 2)
        return _row(
            f"Opinion: {random.choice(VERDICTS).format(a=a, b=b)}\nVerdict:", "good" if good else "bad", a, b
        )
    task = 0 if kind == "other_words" else int(kind[-1])
    number = 3 * task + random.randrange(3)
    a, b = random.sample(CLASSES[number], 2)
    forms = OTHER_FORMS if kind == "other_words" else FORMS
    return _row(f"Goods: {random.choice(forms).format(a=a, b=b)}\nKind:", NAMES[number], a, b)


def _row(prompt: str, answer: str, a: str, b: str) -> dict:
    return {"prompt": prompt, "completion": f" {answer}", "answer": answer, "item": " ".join(sorted((a, b)))}


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


verify = same_text
