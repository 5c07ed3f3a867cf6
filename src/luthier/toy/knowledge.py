"""Facts to teach, and questions that need them in another form: a small benchmark of knowledge injection.

`profiles` are new facts, about people who are in no text of pretraining; `renames` are updated ones,
functions of a made-up library that are called otherwise now. Each has the questions to train on and, by
column `source`, derived ones: reworded, as a comparison of two people, as code that uses the new name.
`answer` is an oracle, which answers every row from the table of facts.
"""

from luthier.toy.tasks._random import Random
from luthier.toy.tasks.people import ATTRIBUTES, HELD_BACK, ask

SETS = {
    "profiles": ["profiles_reworded", "profiles_compared"],
    "renames": ["renames_in_code"],
}
VERBS = "load save draw read send open find sort join split count merge".split()
NOUNS = "table image graph file text list map page node row".split()


def profiles(people: int = 50, seed: int = 0) -> list[dict]:
    """Five facts of each of the first `people`: each is trained on as one question, and asked again in two
    other wordings; years of birth also compare two people.

    Raises ValueError for more people than there are.
    """
    if not 2 <= people <= len(HELD_BACK):
        raise ValueError(f"there are 2 to {len(HELD_BACK)} people, not {people}")
    rows = []
    for person in HELD_BACK[:people]:
        for attribute in ATTRIBUTES:
            for form, source in enumerate(("profiles", "profiles_reworded", "profiles_reworded")):
                fact = {"fact": [person["name"], attribute]}
                rows.append(_row(source, ask(person, attribute, form), person[attribute], **fact))
    random = Random(f"knowledge/{seed}")
    for person in HELD_BACK[:people]:
        others = [one for one in HELD_BACK[:people] if one["year"] != person["year"]]
        if not others:
            continue
        other = random.choice(others)
        older = min(person, other, key=lambda one: int(one["year"]))["name"]
        question = f"Who is older, {person['name']} or {other['name']}?"
        names = {"fact": [person["name"], other["name"], "older"]}
        rows.append(_row("profiles_compared", question, older, **names))
    return rows


def renames(functions: int = 50, seed: int = 0) -> list[dict]:
    """Functions and their new names: asked by the old name, and to be completed in code that said it.

    Raises ValueError for more functions than there are names.
    """
    names = [f"{verb}_{noun}" for verb in VERBS for noun in NOUNS]
    if not 1 <= functions <= len(names) // 2:
        raise ValueError(f"there are 1 to {len(names) // 2} functions, not {functions}")
    Random(f"knowledge/renames/{seed}").shuffle(names)
    rows = []
    for old, new in zip(names[:functions], names[functions : 2 * functions], strict=True):
        fact = {"fact": [old, "new name"]}
        rows.append(_row("renames", f"What is the function {old} called now?", new, **fact))
        prompt = f"# instead of {old}\nresult = library."
        row = {"prompt": prompt, "completion": f"{new}(data)", "answer": f"{new}(data)"}
        rows.append({**row, "source": "renames_in_code", **fact})
    return rows


def facts(rows: list[dict]) -> dict[tuple[str, str], str]:
    """The table that the questions of training state: (what, which of its properties) -> value."""
    return {tuple(row["fact"]): row["answer"] for row in rows if row["source"] in SETS}


def answer(row: dict, table: dict[tuple[str, str], str]) -> str:
    """A row's answer from the table of facts alone."""
    *names, what = row["fact"]
    if what == "older":
        return min(names, key=lambda name: int(table[name, "year"]))
    value = table[names[0], what]
    return f"{value}(data)" if row["source"] == "renames_in_code" else value


def _row(source: str, question: str, answer: str, **columns: list[str]) -> dict:
    text = {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}", "answer": answer}
    return {**text, "source": source, **columns}
