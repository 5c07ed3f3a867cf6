"""Short conversations: greetings, facts about the people, sums, moods, and remembering a name.

Some begin with the system message "Be brief.", which shortens facts and sums to the bare answer. A
conversation is held out when a fact, a sum or a pair of qualities in it is; "ood" conversations ask more
questions in a row.
"""

from random import Random

from . import people, sentiment
from ._sample import join_atoms, sample, sum_atom
from ._words import BAD, FRIENDS, GOOD, THINGS

SHARE = 0.12
SPLITS = {
    "train": {"short": 1},
    "validation": {"short": 1},
    "test": {"short": 1},
    "ood": {"long": 1},
}
BRIEF = "Be brief."
GREETINGS = ["Hello!", "Hi there.", "Good morning.", "Hey, are you there?"]
FAREWELLS = ["Thank you.", "Thanks a lot!", "That is all, thanks."]

Exchange = tuple[str, str, str]  # what the user says, what the assistant says, the atom it is about


def _fact(random: Random, brief: bool) -> Exchange:
    person, attribute = random.choice(people.ASKED), random.choice(people.ATTRIBUTES)
    answer = f"{person[attribute]}." if brief else people.state(person, attribute, 0)
    return people.ask(person, attribute, random.randrange(3)), answer, people.fact_atom(person, attribute)


def _sum(random: Random, brief: bool) -> Exchange:
    a, b, sign = random.randint(10, 99), random.randint(10, 99), random.choice("+-")
    if sign == "-" and b > a:
        a, b = b, a
    result = a + b if sign == "+" else a - b
    question = random.choice(("What is {}?", "How much is {}?")).format(f"{a}{sign}{b}")
    return question, f"{result}." if brief else f"{a}{sign}{b} is {result}.", sum_atom(a, sign, b)


def _mood(random: Random, brief: bool) -> Exchange:
    good = random.random() < 0.5
    a, b = random.sample(GOOD if good else BAD, 2)
    answer = "I am glad you liked it." if good else "I am sorry to hear that."
    return f"The {random.choice(THINGS)} was {a} and {b}.", answer, sentiment.pair_atom(a, b)


QUESTIONS = [_fact, _sum, _mood]


def draw(random: Random, kind: str) -> dict:
    brief = random.random() < 0.3
    count = random.randint(3, 4) if kind == "long" else random.randint(1, 2)
    exchanges = [random.choice(QUESTIONS)(random, brief) for _ in range(count)]
    if random.random() < 0.3:
        name = random.choice(FRIENDS)
        exchanges.insert(0, (f"My name is {name}.", f"Nice to meet you, {name}!", ""))
        exchanges.append(("What is my name?", f"Your name is {name}.", ""))
    elif random.random() < 0.3:
        exchanges.insert(0, (random.choice(GREETINGS), "Hello! How can I help you?", ""))
    if random.random() < 0.2:
        exchanges.append((random.choice(FAREWELLS), "You are welcome!", ""))
    messages = [{"role": "system", "content": BRIEF}] if brief else []
    for user, assistant, _ in exchanges:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {
        "messages": messages,
        "answer": messages[-1]["content"],
        "item": join_atoms(*(atom for *_, atom in exchanges)),
    }


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)
