"""Files and folders as people have them, and rows that other libraries hold in Python."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os

import numpy as np
import pytest

from luthier.data.lines import MAX_LINE
from luthier.data.load import load_data
from luthier.data.load import load_rows as load
from luthier.data.quarantine import TooManyBadRows
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe

ROWS = [{"prompt": f"Capital {i}?", "completion": f" City {i}"} for i in range(6)]
USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
PROMPTS = [row["prompt"] for row in ROWS]


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts(source, **settings):
    return [row["prompt"] for row in load(source, **settings).rows]


def table(path, text):
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    "name, header, line",
    [
        ("rows.csv", "prompt;completion", "{};City, of course"),
        ("rows.csv", "prompt\tcompletion", "{}\tCity, of course"),
        ("rows.csv", "prompt|completion", "{}|City, of course"),
        ("rows.csv", "prompt, completion", "{}, City"),
        ("rows.csv", "prompt, completion", '{}, "City, of course"'),
        ("rows.csv", '\ufeffPrompt,"Completion "', "{},City"),
        ("rows.csv", "PROMPT,COMPLETION,", "{},City,x"),
        ("rows.csv", '"prompt","completion"', '"{}","City\n\nand more"'),
        ("rows.tsv", "prompt\tcompletion", "{}\tCity"),
        ("rows.tsv", "prompt,completion", "{},City"),
    ],
)
def test_tables_whatever_separates_their_cells(name, header, line, tmp_path):
    lines = [header, *(line.format(prompt) for prompt in PROMPTS)]
    loaded = load(table(tmp_path / name, "\r\n".join(lines) + "\r\n"))
    assert loaded.format == "prompt_completion" and not loaded.bad
    assert [row["prompt"] for row in loaded.rows] == PROMPTS
    assert all(row["completions"][0].lstrip().startswith("City") for row in loaded.rows)


def test_names_are_told_where_they_are_read_as_others(tmp_path):
    loaded = load(table(tmp_path / "rows.csv", "Question,Answer\na,b\n"))
    assert loaded.format == "question_answer"
    assert "'Question' as 'question', 'Answer' as 'answer'" in loaded.notes[0]
    kept = load([{"prompt": "a", "completion": "b", "Label": "x"}]).rows[0]
    assert kept["Label"] == "x" and kept["completions"] == ["b"]


def test_a_header_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_bytes("text,naïve\nhello,x\n".encode("latin-1"))
    with pytest.raises(RecipeError, match="the header is not UTF-8.*iconv -f LATIN1"):
        load(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps({"data": ROWS}),
        json.dumps({"train": ROWS, "test": ROWS[:1]}),
        json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
        json.dumps({key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]}),
        json.dumps({"columns": ["prompt", "completion"], "data": [[*row.values()] for row in ROWS]}),
        "\n\n".join(map(json.dumps, ROWS)) + "\n\n",
        "\r\n".join(map(json.dumps, ROWS)),
        "\n".join(json.dumps(row, indent=1) for row in ROWS),
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_in_its_shapes(content, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    if name == "rows.jsonl" and content.startswith("{") and '"data"' not in content[:20]:
        if content.count("\n") == 0:
            pytest.skip("an object on one line is a row of a .jsonl file")
    if name == "rows.jsonl" and content.startswith('{"data"'):
        pytest.skip("an object on one line is a row of a .jsonl file")
    loaded = load(path)
    assert [row["prompt"] for row in loaded.rows] == PROMPTS and not loaded.bad


def test_single_objects_and_lists_of_conversations(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0]))
    assert prompts(tmp_path / "one.json") == PROMPTS[:1]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    (tmp_path / "talks.json").write_text(json.dumps([turns, turns]))
    write(tmp_path / "talks.jsonl", [turns, turns])
    for name in ("talks.json", "talks.jsonl"):
        assert [row["prompt"] for row in load(tmp_path / name).rows] == [turns[:1]] * 2
    (tmp_path / "chat.json").write_text(json.dumps({"messages": turns}))
    assert len(load(tmp_path / "chat.json").rows) == 1


def test_packed_files(tmp_path):
    import pyarrow

    content = write(tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(content))
    (tmp_path / "b.jsonl.bz2").write_bytes(bz2.compress(content))
    with pyarrow.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as file:
        file.write(content)
    (tmp_path / "d.jsonl.GZ").write_bytes(gzip.compress(content))
    for name in ("a.jsonl.xz", "b.jsonl.bz2", "c.jsonl.zst", "d.jsonl.GZ"):
        assert prompts(tmp_path / name) == PROMPTS, name
    for name in ("a.jsonl.xz", "b.jsonl.bz2", "c.jsonl.zst"):
        torn = tmp_path / f"torn-{name}"
        torn.write_bytes((tmp_path / name).read_bytes()[:-9])
        with pytest.raises(RecipeError, match="could not be read completely"):
            load(torn)
    for name, advice in (
        ("rows.zip", "unzip it"),
        ("rows.xlsx", "save the sheet as .csv"),
        ("x.pkl", "run code"),
    ):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(RecipeError, match=advice):
            load(tmp_path / name)


@pytest.mark.long
def test_what_is_no_plain_file_or_has_no_end_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(RecipeError, match="is a pipe, a socket or a device"):
        load(tmp_path / "rows.jsonl")
    monkeypatch.setattr("luthier.data.lines.UNPACKED", 2**20)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 10**6))
    with pytest.raises(RecipeError, match="unpacks to more than"):
        load(tmp_path / "bomb.jsonl.gz")


def test_a_line_is_bounded_before_it_is_read(tmp_path):
    lines = [json.dumps(row).encode() for row in ROWS]
    lines[2:2] = [b'{"text": "' + b"x" * (MAX_LINE + 10) + b'"}']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    loaded = load(tmp_path / "rows.jsonl", max_bad_rows=0.5)
    assert [row["prompt"] for row in loaded.rows] == PROMPTS
    assert loaded.bad[0]["where"] == "rows.jsonl:3" and "longer than 32 MB" in loaded.bad[0]["reason"]


def test_long_texts_are_cut_and_nothing_of_them_is_lost(tmp_path):
    words = [f"word{i}" for i in range(300_000)]
    loaded = load(write(tmp_path / "rows.jsonl", [{"text": " ".join(words)}, {"text": "short"}]))
    pieces = [row["completions"][0] for row in loaded.rows[:-1]]
    assert " ".join(pieces).split() == words and len(pieces) > 3
    assert loaded.rows[1]["id"] == "rows.jsonl:1#1" and loaded.rows[-1]["completions"] == ["short"]
    assert len(load({"path": str(tmp_path / "rows.jsonl"), "max_row_chars": 5_000_000}).rows) == 2
    (tmp_path / "line.txt").write_text(" ".join(words))
    assert " ".join(row["completions"][0] for row in load(tmp_path / "line.txt").rows).split() == words
    with pytest.raises(TooManyBadRows, match="longer than 1,000,000 characters"):
        load(write(tmp_path / "pair.jsonl", [{"prompt": "a", "completion": " ".join(words)}]))


# ------------------------------------------------------------------------------------------------ folders


def test_files_for_testing_are_held_out(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", [{"prompt": "TEST", "completion": "x"}])
    data = load_data(Recipe.load({"data": str(tmp_path)}))
    assert [row["prompt"] for row in data.rows] == PROMPTS
    assert [row["prompt"] for row in data.held_out] == ["TEST"]
    assert (
        "from train.jsonl, not from test.jsonl" in data.notes[0] and "the data's own (test)" in data.notes[1]
    )
    write(tmp_path / "validation.jsonl", [{"prompt": "DEV", "completion": "x"}])
    assert load_data(Recipe.load({"data": str(tmp_path)})).held_out[0]["prompt"] == "DEV"
    assert load_data(Recipe.load({"data": str(tmp_path), "eval_data": 0})).held_out == []
    assert prompts({"path": str(tmp_path), "split": "test"}) == ["TEST"]
    with pytest.raises(RecipeError, match="has no split 'tost' .there is: test, train, validation"):
        load({"path": str(tmp_path), "split": "tost"})


def test_what_stands_beside_rows_is_not_read(tmp_path):
    write(tmp_path / "rows.jsonl")
    for name in ("README.txt", "readme.md", "requirements.txt", "requirements-dev.txt", "LICENSE.txt"):
        (tmp_path / name).write_text("Do not share it.\n")
    for name in (".DS_Store", "._rows.jsonl", "~$rows.csv", ".hidden.jsonl", "Thumbs.db", "rows.jsonl~"):
        (tmp_path / name).write_bytes(b"\0\1")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {"prompt": {}}, "splits": {}}))
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "old.jsonl")
    assert prompts(tmp_path) == PROMPTS


def test_the_layout_of_the_hub(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        for i in range(3):
            rows = [{"prompt": f"{split} {i}", "completion": "x"}]
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"{split}-{i:05}-of-00003.parquet")
    data = load_data(Recipe.load({"data": str(tmp_path)}))
    assert [row["prompt"] for row in data.rows] == ["train 0", "train 1", "train 2"]
    assert [row["prompt"] for row in data.held_out] == ["test 0", "test 1", "test 2"]
    subsets = tmp_path / "subsets"
    for name in ("main", "other"):
        write(subsets / name / "train.jsonl", [{"prompt": name, "completion": "x"}])
        write(subsets / name / "test.jsonl", [{"prompt": f"test {name}", "completion": "x"}])
    assert prompts(subsets) == ["main", "other"]
    assert prompts({"path": str(subsets), "name": "other"}) == ["other"]
    assert prompts({"path": str(subsets), "name": "other", "split": "test"}) == ["test other"]
    chat = tmp_path / "chat"
    for name in ("train_sft", "train_gen"):
        write(chat / f"{name}-00000-of-00001.jsonl", [{"prompt": name, "completion": "x"}])
    with pytest.raises(RecipeError, match="has the splits train_gen, train_sft; choose one"):
        load(chat)
    assert prompts({"path": str(chat), "split": "train_sft"}) == ["train_sft"]


def test_dataset_info_in_the_same_folder(tmp_path):
    entries = {
        "mine": {"file_name": "a.json", "columns": {"prompt": "q", "response": "r"}},
        "talk": {
            "file_name": "b.json",
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"},
        },
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    (tmp_path / "a.json").write_text(json.dumps([{"q": "Add.", "r": "2"}]))
    turns = [{"who": "me", "says": "Hi"}, {"who": "it", "says": "Hello!"}]
    (tmp_path / "b.json").write_text(json.dumps([{"turns": turns}]))
    assert load(tmp_path / "a.json").rows[0]["completions"] == [[{"role": "assistant", "content": "2"}]]
    both = load(tmp_path)
    assert both.format == "alpaca + sharegpt" and len(both.rows) == 2
    assert "dataset_info.json says" in both.notes[-1]


def test_prompts_that_axolotl_writes(tmp_path):
    path = write(
        tmp_path / "rows.jsonl", [{"q": "Oslo?", "a": "City"}, {"q": "Lima?", "a": "Town", "input": "x"}]
    )
    layout = {
        "format": "[INST] {instruction} {input} {{}} [/INST]",
        "no_input_format": "[INST] {instruction} [/INST]",
        "system_prompt": "Be brief.",
        "system_format": "<<{system}>>",
        "field_instruction": "q",
        "field_output": "a",
    }
    rows = load([{"path": str(path), "type": layout}]).rows
    assert rows[0]["prompt"] == "<<Be brief.>>[INST] Oslo? [/INST]"
    assert rows[1]["prompt"] == "<<Be brief.>>[INST] Lima? x {} [/INST]"
    assert [row["completions"] for row in rows] == [["City"], ["Town"]]
    with pytest.raises(RecipeError, match="prompt_layout.*formt"):
        load([{"path": str(path), "type": {"formt": "x"}}])


# ------------------------------------------------------------------------------------------------- Python


def rows_of_libraries():
    import datasets
    import pandas

    dataset = datasets.Dataset.from_list(ROWS)
    yield dataset
    yield dataset.to_iterable_dataset()
    yield pandas.DataFrame(ROWS)
    yield dataset.data.table
    yield (row for row in ROWS)
    yield {key: [row[key] for row in ROWS] for key in ROWS[0]}
    yield {"path": dataset, "format": "prompt_completion"}


@pytest.mark.parametrize("i", range(7))
def test_rows_that_other_libraries_hold(i):
    recipe = Recipe.load({"data": list(rows_of_libraries())[i]})
    again = recipe.but(seed=7)  # what can be read only once is read once
    for each in (recipe, again):
        assert [row["prompt"] for row in load_data(each).rows] == PROMPTS
    assert prompts(list(rows_of_libraries())[i]) == PROMPTS


def test_splits_of_python_are_held_out():
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    test = datasets.Dataset.from_list([{"prompt": "TEST", "completion": "x"}])
    data = load_data(Recipe.load({"data": datasets.DatasetDict(train=dataset, test=test)}))
    assert [row["prompt"] for row in data.rows] == PROMPTS
    assert [row["prompt"] for row in data.held_out] == ["TEST"]


def test_numbers_of_numpy_and_pandas():
    import pandas

    rows = [{"text": "fine", "label": np.int64(1)}, {"text": "dull", "label": np.array([0, 1])}]
    assert [row["label"] for row in load(rows).rows] == [1, [0, 1]]
    frame = pandas.DataFrame({"text": ["fine", "good", "dull"], "label": [1.0, 1.0, None]})
    loaded = load(frame, max_bad_rows=0.5)
    assert loaded.rows[0]["completions"] == ["1"] and len(loaded.bad) == 1


def test_escapes_in_cells_of_json_are_checked(tmp_path):
    lines = ["messages", *[json.dumps(json.dumps([USER, BOT])).replace('\\"', '""')] * 9]
    row = r'"[{""role"": ""user"", ""content"": ""HERE""}]"'
    lines += [row.replace("HERE", r"\ud800"), row.replace("HERE", r"\u0000")]
    loaded = load(table(tmp_path / "rows.csv", "\n".join(lines)), max_bad_rows=0.5)
    assert len(loaded.rows) == 9
    assert "surrogate" in loaded.bad[0]["reason"] and "NUL" in loaded.bad[1]["reason"]


def test_numbers_are_read_as_text():
    rows = [{"prompt": "1+1=", "completion": 2}, {"prompt": 3, "completion": 0.5}]
    assert [(row["prompt"], row["completions"]) for row in load(rows).rows] == [
        ("1+1=", ["2"]),
        ("3", ["0.5"]),
    ]
    pair = load([{"prompt": "1+1=", "chosen": 2, "rejected": 3}]).rows[0]
    assert pair["completions"] == ["2", "3"]


def test_names_of_columns_are_checked_like_cells():
    itself: dict = {"prompt": "a", "completion": "b"}
    itself["more"] = itself
    rows = [
        {"text": "a", "\ud800": "b"},
        {"text": "a", "b\0": "b"},
        {"text": "a", "\x1b[2J": "b"},
        {"text": "a", "x" * 2000: "b"},
        {"text": "a", 7: "b"},
        {"prompt": "a", "completion": "b", "prefix": 1.5},
        {"prompt": "a", "completion": "b", "tools": 3},
        {"prompt": "a", "completion": "b", "token_weights": "no"},
        itself,
        {"prompt": "a", "completion": 10**5000},
    ]
    loaded = load([*ROWS, *rows], max_bad_rows=0.9)
    assert len(loaded.rows) == len(ROWS) and len(loaded.bad) == len(rows)
    reasons = " ".join(bad["reason"] for bad in loaded.bad)
    for words in (
        "surrogate",
        "NUL",
        "control",
        "longer than 1,000",
        "not text but int",
        "too large",
        "prefix is a number",
    ):
        assert words in reasons
