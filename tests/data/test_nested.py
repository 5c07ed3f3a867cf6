"""Rows that lie inside others are read with what stands around them, and the user is told; rows of tasks
that are not trained here are refused with what helps.
"""

import json

import pytest

from luthier.data.load import load_rows
from luthier.errors import RecipeError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
ARTICLE = {
    "title": "Rome",
    "paragraphs": [
        {
            "context": "Anna lives in Rome. She is 5.",
            "qas": [
                {
                    "id": "a",
                    "question": "Where does Anna live?",
                    "answers": [{"text": "Rome", "answer_start": 14}],
                },
                {"id": "b", "question": "How old is she?", "answers": [{"text": "5"}, {"text": "five"}]},
            ],
        },
        {"context": "Bob has a dog.", "qas": [{"question": "What has Bob?", "answers": [{"text": "a dog"}]}]},
    ],
}


def test_a_file_of_squad_is_read_question_by_question(tmp_path):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "1.1", "data": [ARTICLE]}))
    loaded = load_rows(str(path))
    assert [row["id"] for row in loaded.rows] == ["a", "b", "squad.json:1.paragraphs[1].qas[0]"]
    assert loaded.rows[1]["prompt"].startswith("Anna lives in Rome. She is 5.\n\nHow old is she?")
    assert loaded.rows[1]["answers"] == ["5", "five"] and loaded.rows[1]["title"] == "Rome"
    assert loaded.notes == [f"{path}: the rows are what lies under paragraphs.qas"]


def test_questions_without_answers_are_set_aside_with_their_place(tmp_path):
    path = tmp_path / "squad.json"
    article = json.loads(json.dumps(ARTICLE))
    article["paragraphs"][1]["qas"].append(
        {"question": "What eats Bob?", "answers": [], "is_impossible": True}
    )
    path.write_text(json.dumps({"data": [article]}))
    loaded = load_rows(str(path), max_bad_rows=0.5)
    assert loaded.total == 4 and len(loaded.rows) == 3
    assert loaded.bad[0]["where"] == "squad.json:1.paragraphs[1].qas[1]"


@pytest.mark.parametrize(
    "row",
    [
        {"data": CHAT},
        {"custom_id": "1", "method": "POST", "body": CHAT},
        {"meta": {"source": {"name": "web"}}, "sample": [CHAT]},
        {"data": {"text": "once upon a time"}},
    ],
)
def test_rows_under_one_column(row):
    loaded = load_rows([row, row])
    assert len(loaded.rows) == 2 and "the rows are what lies under" in loaded.notes[0]


def test_columns_around_a_row_stay_and_give_way_to_its_own():
    body = {"prompt": "a", "completion": "b", "answer": "b"}
    (row,) = load_rows([{"source": "web", "answer": "no", "body": body}]).rows
    assert (row["source"], row["answer"]) == ("web", "b")


def test_a_text_about_a_row_is_no_row():
    with pytest.raises(RecipeError, match="no format matches the columns headline, metadata"):
        load_rows([{"headline": "x", "metadata": {"text": "crawled on Monday"}}])


def test_rows_that_a_format_reads_are_not_looked_into():
    (row,) = load_rows([{"prompt": "a", "completion": "b", "metadata": CHAT}]).rows
    assert row["completions"] == ["b"]


def test_what_is_no_inner_row_is_set_aside_and_not_lost():
    body = {"prompt": "a", "completion": "b"}
    loaded = load_rows([{"pairs": [body, "x"]}, {"pairs": []}, {"pairs": [body]}], max_bad_rows=1)
    assert len(loaded.rows) == 2 and loaded.total == 4
    assert [bad["where"].rpartition(".")[2] for bad in loaded.bad][0] == "pairs[1]" and len(loaded.bad) == 2


def test_a_limit_counts_the_inner_rows():
    assert len(load_rows({"path": [ARTICLE], "limit": 2}).rows) == 2  # of the three of an article


def test_notes_beside_rows_are_no_rows_but_a_folder_of_notes_is(tmp_path):
    (tmp_path / "notes.md").write_text("# Notes\n\nA text.\n")
    (tmp_path / "README.md").write_text("# Read this\n")
    assert [row["completions"] for row in load_rows(str(tmp_path)).rows] == [["# Notes\n\nA text."]]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    assert [row["prompt"] for row in load_rows(str(tmp_path)).rows] == ["a"]


def test_rows_of_embedding_models_are_refused_with_what_helps():
    row = {"anchor": "a", "positive": "b", "negative": "c"}
    with pytest.raises(RecipeError, match="columns: {prompt: anchor, chosen: positive, rejected: negative}"):
        load_rows([row])
    mapped = {"prompt": "anchor", "chosen": "positive", "rejected": "negative"}
    assert len(load_rows([row], columns=mapped).rows) == 1
