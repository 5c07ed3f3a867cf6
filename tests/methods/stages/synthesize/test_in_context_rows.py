"""in_context_rows: rows of tables as text and back, rows of the same table before each question, and a loss
on the answer alone.
"""

from __future__ import annotations

import pytest

from luthier.data.load import load_rows
from luthier.methods.formats._tables import parse, serialise
from luthier.recipe.validate import DryRunRoles
from luthier.registry import build

ODD = {
    "plain": "a plain value",
    "is": "what is is; is",
    'say "so"': '"quoted"',
    "line\nbreak": "two\nlines; a is b",
    "this is": "unknown",
    "unknown": " spaces ",
    "e; f": "-1.5e-3",
    "müde": "ja, sehr",
}


def tables(n: int = 8) -> list[dict]:
    """Two tables in one file, asked about one column and about another."""
    rows = []
    for k in range(n):
        rows.append({"features": {"age": 30 + k, "ill": ["no", "yes"][k % 2]}, "target": "ill"})
        rows.append({"features": {"legs": k, "name": f"n{k}", "big": k > 3}, "target": "legs"})
    return [{**row, "background": f"Table of {row['target']}."} for row in rows]


def test_a_row_is_read_back_from_its_text():
    assert serialise({"age": 40, "sex": "M"}) == "age is 40; sex is M"
    assert parse(serialise(ODD)) == ODD
    row = {"n": 3, "x": 0.25, "flag": True, "none": None, "nan": float("nan"), "empty": ""}
    text = {"n": "3", "x": "0.25", "flag": "true", "none": None, "nan": None, "empty": None}
    assert parse(serialise(row)) == text
    with pytest.raises(ValueError, match="no column with a value"):
        parse("nothing here")


def test_what_is_no_row_of_a_table_is_said():
    odd = [
        {"features": {"a": 1, "b": 2}, "target": "c"},
        {"features": {"a": 1, "b": None}, "target": "b"},
        {"features": {"a": 1}, "target": "a"},
    ]
    bad = load_rows([*tables(), *odd], max_bad_rows=0.5).bad
    reasons = [row["reason"] for row in bad]
    assert "target 'c' is not a column" in reasons[0]
    assert "b, the column that is asked about, is missing" in reasons[1]
    assert "two columns or more" in reasons[2]


def test_the_answer_alone_is_learned(roles):
    rows = load_rows(tables(3)).rows
    some = build("stage", {"name": "in_context_rows", "n": 2})(rows, roles)[:1]
    batch = roles.batch(some)
    learned = roles.renderer.text(batch.labels[batch.targets].tolist(), special=False)
    assert some[0]["prompt"].count("Answer: ") == 2 and learned == " no"


def test_rows_of_one_table_come_before_the_question():
    rows = load_rows(tables()).rows
    stage = build("stage", {"name": "in_context_rows", "n": 3})
    out = list(stage(rows, DryRunRoles()))
    assert out == list(stage(rows, DryRunRoles()))
    for row, sample in zip(rows, out, strict=True):
        background, *lines = sample["prompt"].split("\n")
        target = row["target"]
        assert background == f"Table of {target}." and lines[-1] == "Answer:"
        questions, answers = lines[:-1:2], lines[1:-1:2]
        assert len(questions) == 4 and len(set(questions)) == 4
        assert row["prompt"].splitlines()[1] == questions[-1]
        sources = {r["prompt"].split("\n")[1]: r["completions"][0] for r in rows if r["target"] == target}
        assert [sources[q] for q in questions[:-1]] == [a.removeprefix("Answer:") for a in answers]
        assert sample["completions"] == row["completions"] and "features" not in sample
    few = list(build("stage", {"name": "in_context_rows", "n": 99})(rows, DryRunRoles()))
    assert few[0]["prompt"].count("Answer: ") == 7


def test_without_names():
    rows = load_rows(tables()).rows
    stage = build("stage", {"name": "in_context_rows", "n": 1, "anonymous": 1.0})
    for sample in stage(rows, DryRunRoles()):
        assert not {"age", "legs", "ill", "Table"} & set(sample["prompt"].replace(".", " ").split())
        assert "c1 is " in sample["prompt"] and sample["prompt"].count("What is y?") == 2
