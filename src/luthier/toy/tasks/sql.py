"""Questions about a small sqlite database (`database()`), answered by a query; the verifier runs it and the
right one.

Graded: one table with a condition ("count", "list"), an extreme ("most"), groups ("group"), two tables
("join"). "ood" has two conditions, "new" (for tuning) what is left out ("except"). An item is a question
without its wording.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from functools import cache

from ._random import Random
from ._sample import sample
from ._words import FIRST_NAMES, TOWNS
from .people import JOBS, PETS

SHARE = 0.04
_KINDS = {"count": 0.2, "list": 0.2, "most": 0.2, "group": 0.15, "join": 0.25}
SPLITS = {
    "train": _KINDS,
    "validation": _KINDS,
    "test": _KINDS,
    "ood": {"both": 1},
    "new": {"except": 1},
    "new_test": {"except": 1},
}
SCHEMA = "staff(name, job, town, age); pets(owner, animal)"
PLACES = TOWNS[:16]
ANIMALS, TRADES = PETS[:10], JOBS[:12]
PEOPLE = 40
FUNCTIONS = frozenset(
    "abs avg coalesce count iif ifnull length like lower max min nullif round substr sum total upper".split()
)
MOST_STEPS = 200_000  # of sqlite's machine, for a query that was written


@cache
def database() -> tuple[tuple[tuple, ...], tuple[tuple, ...]]:
    """The rows of staff and pets; names occur once."""
    random = Random("sql/database")
    names = random.sample(FIRST_NAMES, PEOPLE)
    staff = [
        (name, random.choice(TRADES), random.choice(PLACES), 20 + 50 * i // PEOPLE)
        for i, name in enumerate(names)
    ]
    pets = [(random.choice(names), random.choice(ANIMALS)) for _ in range(50)]
    return tuple(staff), tuple(pets)


CONDITIONS = {
    "job": (TRADES, ["work as {v}"]),
    "town": (PLACES, ["live in {v}"]),
    "older": ([str(age) for age in range(21, 70)], ["are over {v}"]),
    "younger": ([str(age) for age in range(21, 70)], ["are under {v}"]),
}
WHERE = {"job": "job = '{v}'", "town": "town = '{v}'", "older": "age > {v}", "younger": "age < {v}"}
EXTREMES = {"oldest": "DESC", "youngest": "ASC"}


def draw(random: Random, kind: str) -> dict:
    question, query, item = QUESTIONS[kind](random)
    return {
        "prompt": f"Tables: {SCHEMA}\nQuestion: {question}\nSQL:",
        "completion": f" {query}",
        "answer": query,
        "item": f"sql {item}",
    }


def _condition(random: Random, names: tuple[str, ...] = tuple(CONDITIONS)) -> tuple[str, str, str]:
    """Its words, its SQL, its item."""
    name = random.choice(names)
    values, forms = CONDITIONS[name]
    value = random.choice(values)
    return random.choice(forms).format(v=value), WHERE[name].format(v=value), f"{name} {value}"


def _count(random: Random) -> tuple[str, str, str]:
    words, where, item = _condition(random)
    form = random.choice(("How many {w}?", "Count those who {w}."))
    return form.format(w=words), f"SELECT COUNT(*) FROM staff WHERE {where}", f"count {item}"


def _list(random: Random) -> tuple[str, str, str]:
    words, where, item = _condition(random)
    column, question = random.choice(
        (("name", "Who"), ("town", "Which towns have those who"), ("job", "Which jobs have those who"))
    )
    end = "?"
    return f"{question} {words}{end}", f"SELECT {column} FROM staff WHERE {where}", f"list {column} {item}"


def _most(random: Random) -> tuple[str, str, str]:
    words, where, item = _condition(random, ("job", "town"))
    extreme = random.choice(list(EXTREMES))
    query = f"SELECT name FROM staff WHERE {where} ORDER BY age {EXTREMES[extreme]} LIMIT 1"
    return f"Who is the {extreme} of those who {words}?", query, f"{extreme} {item}"


def _group(random: Random) -> tuple[str, str, str]:
    column = random.choice(("job", "town"))
    words, where, item = _condition(random, ("older", "younger"))
    what, measure = random.choice(
        (("COUNT(*)", "how many"), ("AVG(age)", "what mean age"), ("MAX(age)", "what highest age"))
    )
    query = f"SELECT {column}, {what} FROM staff WHERE {where} GROUP BY {column}"
    return f"By {column}, {measure} among those who {words}?", query, f"group {column} {what} {item}"


def _join(random: Random) -> tuple[str, str, str]:
    column = random.choice(("name", "job", "town", "age"))
    if random.random() < 0.5:
        animal = random.choice(ANIMALS)
        query = f"SELECT staff.{column} FROM staff JOIN pets ON owner = name WHERE animal = '{animal}'"
        return f"Which {column} have the owners of a {animal}?", query, f"join {column} {animal}"
    words, where, item = _condition(random)
    return (
        f"Which animals do those have who {words}?",
        f"SELECT animal FROM staff JOIN pets ON owner = name WHERE {where}",
        f"join animal {item}",
    )


def _both(random: Random) -> tuple[str, str, str]:
    words, where, item = _condition(random, ("job", "town"))
    more, also, second = _condition(random, ("older", "younger"))
    return (
        f"How many {words} and {more}?",
        f"SELECT COUNT(*) FROM staff WHERE {where} AND {also}",
        f"both {item} {second}",
    )


def _except(random: Random) -> tuple[str, str, str]:
    words, where, item = _condition(random, ("job", "town", "older"))
    return f"Who but those who {words}?", f"SELECT name FROM staff WHERE NOT {where}", f"except {item}"


QUESTIONS = {
    "count": _count,
    "list": _list,
    "most": _most,
    "group": _group,
    "join": _join,
    "both": _both,
    "except": _except,
}


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


def _allowed(action: int, _: str | None, name: str | None, *__: str | None) -> int:
    """Reading, and functions that cannot make much out of little; no recursion."""
    reads = (
        action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
        or action == sqlite3.SQLITE_FUNCTION
        and name in FUNCTIONS
    )
    return sqlite3.SQLITE_OK if reads else sqlite3.SQLITE_DENY


@cache
def _opened() -> sqlite3.Connection:
    """The database in memory, from then on only for reading."""
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    connection.execute("CREATE TABLE staff(name TEXT, job TEXT, town TEXT, age INTEGER)")
    connection.execute("CREATE TABLE pets(owner TEXT, animal TEXT)")
    staff, pets = database()
    connection.executemany("INSERT INTO staff VALUES (?, ?, ?, ?)", staff)
    connection.executemany("INSERT INTO pets VALUES (?, ?)", pets)
    connection.commit()
    connection.set_authorizer(_allowed)
    return connection


def run(query: str) -> list[tuple]:
    """The rows of a query that only reads. Raises sqlite3.Error for any other, and for one that takes too
    long.
    """
    connection, steps = _opened(), 0

    def step() -> int:
        nonlocal steps
        steps += 1000
        return steps > MOST_STEPS

    connection.set_progress_handler(step, 1000)
    return connection.execute(query).fetchmany(10_000)


def verify(row: dict, answer: str) -> float:
    """1.0 where the written query gives the rows of the right one (in any order, unless it asks for one);
    else 0.0.
    """
    try:
        result = run(answer)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
        return 0.0
    right = run(row["answer"])
    return float(result == right if "ORDER BY" in row["answer"] else Counter(result) == Counter(right))
