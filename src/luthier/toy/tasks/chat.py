"""Short conversations: greetings, facts about the people, sums, moods, and remembering a name.

System messages: "Be brief." shortens facts and sums to the bare answer, "You are NAME." says who the
assistant is; in the splits "new" and "new_test" one more is for tuning, "Say over." (every answer ends with
"Over."). A conversation is held out when a fact, a sum or a pair of qualities in it is; "ood" conversations
ask more questions in a row.

"instruct" and "instruct_test" are rows of other tasks as one turn each, which pretraining never shows as a
chat: what an instruction-tuned model is made of.
"""

from . import arithmetic, code, language, people, refusal, sentiment, topic, word_problems
from ._random import Random
from ._sample import join_atoms, sample, sum_atom
from ._words import BAD, FRIENDS, GOOD, THINGS

SHARE = 0.09
SPLITS = {
    "train": {"short": 1},
    "validation": {"short": 1},
    "test": {"short": 1},
    "ood": {"long": 1},
    "new": {"over": 1},
    "new_test": {"over": 1},
}
INSTRUCT = {
    "people": "question",
    "arithmetic": "worked",
    "word_problems": "two_steps",
    "sentiment": "review",
    "topic": "text",
    "language": "to_zorian",
    "code": "list",
    "refusal": "unsafe",
    "refusal/safe": "safe",
    "refusal/lookalike": "lookalike",
}
SPLITS |= {split: dict.fromkeys(INSTRUCT, 1) for split in ("instruct", "instruct_test")}
BRIEF, OVER = "Be brief.", "Say over."
GREETINGS = ["Hello!", "Hi there.", "Good morning.", "Hey, are you there?"]
FAREWELLS = ["Thank you.", "Thanks a lot!", "That is all, thanks."]
_TASKS = {
    module.__name__.rpartition(".")[2]: module
    for module in (people, arithmetic, word_problems, sentiment, topic, language, code, refusal)
}

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
    if kind in INSTRUCT:
        return _instruction(random, kind)
    over, brief, me = kind == "over", random.random() < 0.3, ""
    count = random.randint(3, 4) if kind == "long" else random.randint(1, 2)
    exchanges = [random.choice(QUESTIONS)(random, brief and not over) for _ in range(count)]
    if random.random() < 0.3:
        name = random.choice(FRIENDS)
        exchanges.insert(0, (f"My name is {name}.", f"Nice to meet you, {name}!", ""))
        exchanges.append(("What is my name?", f"Your name is {name}.", ""))
    elif random.random() < 0.3:
        exchanges.insert(0, (random.choice(GREETINGS), "Hello! How can I help you?", ""))
    if not brief and random.random() < 0.25:
        me = random.choice(FRIENDS)
        exchanges.append(("Who are you?", f"I am {me}.", ""))
    if random.random() < 0.2:
        exchanges.append((random.choice(FAREWELLS), "You are welcome!", ""))
    system = [f"You are {me}."] * bool(me) + ([OVER] if over else [BRIEF] if brief else [])
    messages = [{"role": "system", "content": " ".join(system)}] if system else []
    for user, assistant, _ in exchanges:
        messages += [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant + " Over." * over},
        ]
    return _conversation(messages, join_atoms(*(atom for *_, atom in exchanges)))


def _conversation(messages: list[dict], item: str) -> dict:
    return {"messages": messages, "answer": messages[-1]["content"], "item": item}


def _instruction(random: Random, kind: str) -> dict:
    """A row of another task as a question and an answer. Its verifier reads that row under `of`."""
    task = kind.partition("/")[0]
    row = _TASKS[task].draw(random, INSTRUCT[kind])
    question, answer = row["prompt"], row["completion"].strip()
    if task == "code":  # the function's first line is the assistant's to write
        question, first, _ = question.partition("\ndef f(x):")
        answer = first.strip() + row["completion"]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {**_conversation(messages, row["item"]), "of": {"task": task, **row}}


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


def verify(row: dict, answer: str) -> float:
    """1.0 for the right last turn; for "instruct" rows what the task they come from says."""
    if "of" in row:
        return _TASKS[row["of"]["task"]].verify(row["of"], answer)
    return float(answer.strip() == row["answer"])
