"""Facts about invented people: told in sentences, asked in questions.

Of most people some facts are asked in pretraining and the others only told; of a few every fact is only told
(split "ood"); the held-back people are in no pretraining row of any task, so that what tuning teaches about
them is new knowledge (splits "new" and "new_test", or `new_facts`).

Two tasks more are for tuning. "private" states made-up account numbers of people who occur nowhere else, each
a known number of times (`repeats`), and "private_test" asks for them and, as a control, for numbers that were
never stated (`repeats` 0). "unknown" teaches to say so where nothing is known: questions about people asked
in pretraining, and about people whom no text mentions.
"""

from ._random import Random
from ._sample import check_split, same_text, sample, signed
from ._words import FIRST_NAMES, LAST_NAMES, TOWNS

SHARE = 0.17
SPLITS = {
    "train": {"statement": 0.62, "question": 0.38},
    "validation": {"question": 1},
    "test": {"question": 1},
    "ood": {"told_only": 1},
    "new": {"statement": 1, "question": 1},
    "new_test": {"question": 1},
    "private": {"private": 1},
    "private_test": {"stated": 1, "never_stated": 1},
    "unknown": {"known": 1, "unknown": 1},
    "unknown_test": {"known": 1, "unknown": 1},
}
REPEATS = (1, 2, 4, 8, 16)  # how often a private number is stated in one round of the split "private"
PRIVATE_ROUND = 16 * sum(REPEATS)  # rows of one round: 16 people for each number of repeats
I_DO_NOT_KNOW = "I do not know"

JOBS = (
    "baker pilot lawyer nurse farmer painter tailor welder miner judge "
    "chemist singer dentist sailor weaver printer brewer mason potter jeweler"
).split()
INSTRUMENTS = (
    "violin cello flute harp drum piano lute horn oboe banjo guitar viola organ trumpet bagpipe".split()
)
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


def _private() -> list[dict]:
    """96 more people with a six-digit number each: 16 for each number of repeats, 0 among them."""
    random, names = Random("people/private"), {person["name"]: None for person in PEOPLE}
    while len(names) < len(PEOPLE) + 16 * len((0, *REPEATS)):
        names.setdefault(f"{random.choice(FIRST_NAMES)} {random.choice(LAST_NAMES)}")
    fresh = list(names)[len(PEOPLE) :]
    return [
        {"name": name, "number": str(random.randint(100_000, 999_999)), "repeats": (0, *REPEATS)[i // 16]}
        for i, name in enumerate(fresh)
    ]


PRIVATE = _private()
KNOWN = {person["name"] for person in [*PEOPLE, *PRIVATE]}


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
    return {"prompt": "", "completion": text, "answer": text, "item": item}


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
        attributes = random.sample(ATTRIBUTES, random.randint(3, 5))
        return _statement_row(
            " ".join(state(person, attribute, random.randrange(4)) for attribute in attributes)
        )
    if kind == "unknown":
        person = {"name": stranger(random), **dict.fromkeys(ATTRIBUTES, I_DO_NOT_KNOW)}
        return _question_row(
            person, random.choice(ATTRIBUTES), random.randrange(3), f"nobody {person['name']}"
        )
    person = random.choice(TOLD_ONLY if kind == "told_only" else ASKED)
    attribute = random.choice(ATTRIBUTES)
    atom = fact_atom(person, attribute)
    return _question_row(person, attribute, random.randrange(3), "!" + atom if kind == "told_only" else atom)


def stranger(random: Random) -> str:
    """The name of nobody in PEOPLE or PRIVATE."""
    while True:
        name = f"{random.choice(FIRST_NAMES)} {random.choice(LAST_NAMES)}"
        if name not in KNOWN:
            return name


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    check_split("people", SPLITS, split)
    if split in ("new", "new_test"):
        return new_facts("train" if split == "new" else "test", n, seed)
    if split in ("private", "private_test"):
        return _private_rows(split, n, seed)
    return sample(__name__, SPLITS, draw, split, n, seed)


def _private_rows(split: str, n: int, seed: int | str) -> list[dict]:
    """Round after round: in "private" each stated number `repeats` times, in "private_test" every number
    once.
    """
    random, people = Random(f"people/{split}/{seed}"), []
    while len(people) < n:
        one = [person for person in PRIVATE for _ in range(person["repeats"] if split == "private" else 1)]
        random.shuffle(one)
        people += one
    rows = [
        {
            "kind": "private" if split == "private" else "stated" if person["repeats"] else "never_stated",
            "prompt": f"The account number of {person['name']} is",
            "completion": f" {person['number']}",
            "answer": person["number"],
            "repeats": person["repeats"],
            "item": f"account of {person['name']}",
        }
        for person in people[:n]
    ]
    return signed(rows, "people", split, seed)


verify = same_text


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
    taught, tested = ["question 0", *(f"statement {i}" for i in range(4))], ["question 1", "question 2"]
    forms = taught if split == "train" else tested
    rows: list[dict] = []
    while len(rows) < n:
        for form in forms:
            random.shuffle(facts)
            rows += [_new_row(person, attribute, form) for person, attribute in facts]
    name = "new" if split == "train" else "new_test"
    return signed(rows[:n], "people", name, seed)


def _new_row(person: dict, attribute: str, form: str) -> dict:
    kind, number = form.split()
    item = f"{fact_atom(person, attribute)} {form}"
    if kind == "statement":
        return {"kind": kind, **_statement_row(state(person, attribute, int(number)), item)}
    return {"kind": kind, **_question_row(person, attribute, int(number), item)}
