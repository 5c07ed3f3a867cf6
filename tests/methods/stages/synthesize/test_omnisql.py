"""omnisql: failing queries leave, results vote, stored queries give stored results."""

from __future__ import annotations

import torch

from helpers.synthesis import Scripted, nobody
from luthier.methods.stages.synthesize.omnisql import OmniSQL, central, identity
from luthier.registry import build
from luthier.sandbox.sql import run_query

DATABASE = (
    "CREATE TABLE person(name TEXT, age INT);INSERT INTO person VALUES ('Ann', 31), ('Bo', 25), ('Cy', 47);"
)
QUERIES = [
    "SELECT name FROM person WHERE age > 30",
    "SELECT name FROM person WHERE age > 40",  # the first with another value
    "SELECT nothing FROM nowhere",
    "DELETE FROM person",
    "SELECT COUNT(*) FROM person",
]
SOLUTIONS = ["SELECT name FROM person WHERE age >= 31", "SELECT name FROM person", "SELEC", "SELECT 'x'"]


class ByWords(OmniSQL):
    def vectors(self, roles, texts):
        words = sorted({word for text in texts for word in text.split()})
        table = torch.tensor([[float(word in text.split()) for word in words] for text in texts])
        return torch.nn.functional.normalize(table, dim=-1)


def made(**settings):
    queries, solutions = iter(QUERIES * 9), iter(range(10**6))

    def script(prompt: str, seed: int) -> str:
        if prompt.startswith("Invent"):
            return f"[SQL]{DATABASE if 'people' in prompt else 'CREATE nonsense'}[/SQL]"
        if prompt.startswith("Write one"):
            return f"[SQL]{next(queries)}[/SQL]"
        if prompt.startswith("Which question"):
            return "Bananas" if seed % 7 == 0 else f"Who is {['over', 'past'][seed % 2]} thirty ?"
        k = next(solutions)
        return f"Look at ages.\n```sql\n{SOLUTIONS[0] if k % 5 in (1, 3, 4) else SOLUTIONS[k % 4]}\n```"

    settings = {"queries": 5, "questions": 6, "solutions": 5, **settings}
    return ByWords(writer=Scripted(script), **settings)


def test_failing_queries_leave_and_the_vote_decides():
    roles = nobody()
    rows = [{"id": "0", "prompt": "", "database": DATABASE}]
    out = list(made()(rows, roles))
    reasons = roles.sentences[-1]
    assert len(out) == 2 and "2 is no query that gives rows" in reasons and "1 repeats another" in reasons
    for row in out:
        assert row["votes"] >= 3 and row["result"] == [["Ann"], ["Cy"]] and row["answer"] == SOLUTIONS[0]
        assert SOLUTIONS[0] in row["completions"][0] and "thirty" in row["prompt"]
        assert "Bananas" not in row["prompt"] and row["provenance"]["writer"] == "scripted"


def test_stored_queries_give_the_stored_results():
    rows = [{"id": "0", "prompt": "a list of people"}, {"id": "1", "prompt": "nothing"}]
    roles = nobody()
    out = list(made()(rows, roles))
    assert out and "1" in roles.dropped
    for row in out:
        assert [list(line) for line in run_query(row["database"], row["answer"])] == row["result"]
        assert build("reward", "sql").scores(row, row["completions"]) == [1.0]


def test_accuracy_ignores_order_unless_it_is_wanted():
    a, b = [("x", 1), ("y", 2)], [("y", 2), ("x", 1)]
    assert identity("SELECT 1", a) == identity("SELECT 1", b)
    assert identity("SELECT 1 ORDER BY 2", a) != identity("SELECT 1 ORDER BY 2", b)
    row = {"id": "0", "database": DATABASE, "answer": "SELECT name FROM person"}
    score = build("reward", "sql").scores
    assert score(row, ["SELECT name FROM person ORDER BY age"]) == [1.0]
    ordered = {**row, "answer": "SELECT name FROM person ORDER BY age"}
    assert score(ordered, ["SELECT name FROM person ORDER BY name DESC"]) == [0.0]
    assert central(torch.eye(3)) == 0
