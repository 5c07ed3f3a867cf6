"""Facts about invented people: told in sentences, asked in questions.

Of most people some facts are asked in pretraining and the others only told; of a few every fact is only told
(split "ood"); the held-back people are in no pretraining row of any world, so that what tuning teaches about
them is new knowledge (splits "new" and "new_test", or `new_facts`).
"""

from random import Random

from ._sample import check_split, sample
from ._words import FIRST_NAMES, LAST_NAMES, TOWNS

SHARE = 0.24
SPLITS = {
    "train": {"statement": 0.62, "question": 0.38},
    "validation": {"question": 1},
    "test": {"question": 1},
    "ood": {"told_only": 1},
    "new": {"statement": 1, "question": 1},
    "new_test": {"question": 1},
}

JOBS = (
    "baker pilot lawyer nurse farmer painter tailor welder miner judge "
    "chemist singer dentist sailor weaver printer brewer mason potter jeweler"
).split()
INSTRUMENTS = "violin cello flute harp drum piano lute horn oboe banjo guitar viola organ trumpet bagpipe".split()
PETS = "cat dog owl snake goat horse parrot turtle rabbit fox ferret crow hedgehog pony frog".split()

STATEMENTS = {
    "town": [
        "{n} lives in {v}.",
        "The home of {n} is {v}.",
        "You can find {n} in {v}.",
        "{n} settled in {v}.",
    ],
    "job": [
        "{n} works as a {v}.",
        "{n} is a {v} by trade.",
        "The profession of {n} is {v}.",
        "{n} became a {v}.",
    ],
    "year": [
        "{n} was born in {v}.",
        "The birth year of {n} is {v}.",
        "Born: {n}, {v}.",
        "The life of {n} began in {v}.",
    ],
    "instrument": [
        "{n} plays the {v}.",
        "{n} practices the {v}.",
        "The instrument of {n} is the {v}.",
        "{n} studied the {v}.",
    ],
    "pet": ["{n} owns a {v}.", "{n} keeps a {v}.", "The pet of {n} is a {v}.", "At home {n} has a {v}."],
}
QUESTIONS = {
    "town": ["Where does {n} live?", "Which town is home to {n}?", "In what place does {n} live?"],
    "job": ["What is the job of {n}?", "What does {n} do for a living?", "What is the profession of {n}?"],
    "year": ["When was {n} born?", "What is the birth year of {n}?", "In which year was {n} born?"],
    "instrument": [
        "What instrument does {n} play?",
        "Which instrument is played by {n}?",
        "What does {n} play?",
    ],
    "pet": ["What pet does {n} have?", "Which animal does {n} own?", "What animal lives with {n}?"],
}
ATTRIBUTES = list(STATEMENTS)


def _everybody(count: int) -> list[dict]:
    random, people = Random("people"), {}
    while len(people) < count:
        name = f"{random.choice(FIRST_NAMES)} {random.choice(LAST_NAMES)}"
        person = {
            "name": name,
            "town": random.choice(TOWNS),
            "job": random.choice(JOBS),
            "year": str(random.randint(1900, 1999)),
            "instrument": random.choice(INSTRUMENTS),
            "pet": random.choice(PETS),
        }
        people.setdefault(name, person)
    return list(people.values())


PEOPLE = _everybody(520)
ASKED, TOLD_ONLY, HELD_BACK = PEOPLE[:320], PEOPLE[320:400], PEOPLE[400:]


def state(person: dict, attribute: str, form: int) -> str:
    """One fact as a sentence."""
    return STATEMENTS[attribute][form].format(n=person["name"], v=person[attribute])


def ask(person: dict, attribute: str, form: int) -> str:
    """One fact as a question, without its answer."""
    return QUESTIONS[attribute][form].format(n=person["name"])


def fact_atom(person: dict, attribute: str) -> str:
    """The atom of asking one fact (telling a fact holds nothing out)."""
    return f"{person['name']} {attribute}"


def _statement_row(text: str, item: str = "") -> dict:
    return {"prompt": "", "completion": text, "item": item}


def _question_row(person: dict, attribute: str, form: int, item: str) -> dict:
    return {
        "prompt": f"Question: {ask(person, attribute, form)}\nAnswer:",
        "completion": f" {person[attribute]}",
        "answer": person[attribute],
        "item": item,
    }


def draw(random: Random, kind: str) -> dict:
    if kind == "statement":
        person = random.choice(PEOPLE[: len(ASKED) + len(TOLD_ONLY)])
        told = random.sample(ATTRIBUTES, random.randint(3, 5))
        return _statement_row(" ".join(state(person, attribute, random.randrange(4)) for attribute in told))
    person = random.choice(TOLD_ONLY if kind == "told_only" else ASKED)
    attribute = random.choice(ATTRIBUTES)
    atom = fact_atom(person, attribute)
    return _question_row(person, attribute, random.randrange(3), "!" + atom if kind == "told_only" else atom)


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    check_split("people", SPLITS, split)
    if split in ("new", "new_test"):
        return new_facts("train" if split == "new" else "test", n, seed)
    return sample(__name__, SPLITS, draw, split, n, seed)


def new_facts(split: str, n: int, seed: int | str = 0, people: int = 40) -> list[dict]:
    """Rows about held-back people, to teach ("train") and to ask in other words ("test").

    Teaching goes round all facts (5 a person), each time in another form: first the first question form, then
    the four statements; so the first `5 * people` rows already touch every fact. The test asks the same facts
    in the two question forms that were not taught.
    """
    if split not in ("train", "test"):
        raise ValueError(f"new facts have the splits train and test, not {split!r}")
    if not 1 <= people <= len(HELD_BACK):
        raise ValueError(f"there are {len(HELD_BACK)} held-back people, not {people}")
    random = Random(f"people/new facts/{split}/{seed}")
    facts = [(person, attribute) for person in HELD_BACK[:people] for attribute in ATTRIBUTES]
    taught, asked = ["question 0", *(f"statement {i}" for i in range(4))], ["question 1", "question 2"]
    forms = taught if split == "train" else asked
    found: list[dict] = []
    while len(found) < n:
        for form in forms:
            random.shuffle(facts)
            found += [_new_row(person, attribute, form) for person, attribute in facts]
    name = "new" if split == "train" else "new_test"
    return [{"id": f"people/{name}/{seed}/{i}", **row} for i, row in enumerate(found[:n])]


def _new_row(person: dict, attribute: str, form: str) -> dict:
    kind, number = form.split()
    item = f"{fact_atom(person, attribute)} {form}"
    if kind == "statement":
        return {"kind": kind, **_statement_row(state(person, attribute, int(number)), item)}
    return {"kind": kind, **_question_row(person, attribute, int(number), item)}
