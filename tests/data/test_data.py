"""Files to rows: every public shape, every kind of bad row with its place and reason, encodings, splits."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from helpers.paths import DATA
from luthier.data.load import load_data
from luthier.data.load import load_rows as load
from luthier.data.quarantine import TooManyBadRows, write_quarantine
from luthier.data.sources import resolve_source
from luthier.data.split import content_key, split
from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow
from luthier.recipe.recipe import Recipe
from luthier.registry import build, names

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}


TOOL = {"name": "find", "description": "Finds.", "parameters": {"type": "object", "properties": {}}}


SHAPES = {
    "text": {"text": "Once upon a time."},
    "prompt_completion": {"prompt": "2+2=", "completion": " 4", "source": "sums"},
    "messages": {"messages": [USER, BOT], "tools": [TOOL]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
    "alpaca": {"instruction": "Add.", "input": "2 and 2", "output": "4"},
    "preference": {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
    "pairwise": {"instruction": "Hi", "output_1": "What?", "output_2": "Hello!", "preference": 1.75},
    "unpaired": {"prompt": "Hi", "completion": "Hello!", "label": False},
    "ranked": {"prompt": "Hi", "completions": ["What?", "Hello!"], "scores": [1, 7.5]},
    "completions": {"prompt": "Hi", "completions": ["Hello!"]},
    "stepwise": {"prompt": "2+2*3?", "completions": ["2*3=6", "2+6=9"], "labels": [True, False]},
    "step_preference": {"prompt": "2+2*3?", "prefix": "2*3=6\n", "chosen": "2+6=8", "rejected": "2+6=9"},
    "labelled": {"text": "a fine film", "label": 1},
    "labelled_media": {"audio": {"array": [0.0, 0.5], "sampling_rate": 8000}, "label": 1},
    "tagged": {"tokens": ["Ann", "sings"], "tags": ["B-person", "O"]},
    "table": {"features": {"age": 40, "sex": "M", "ill": "no"}, "target": "ill"},
    "prompt": {"prompt": "2+2=", "answer": "4"},
    "question_answer": {"question": "What is 2+2?", "answer": "2+2=4\n#### 4"},
    "query_response": {"query": "Hi", "response": "Hello!", "system": "Be brief.", "source": "web"},
    "multiple_choice": {"question": "2+2?", "choices": ["3", "4"], "answer": 1},
    "comparison": {"prompt": "Hi", "response_a": "What?", "response_b": "Hello!", "winner": "model_b"},
    "translation": {"translation": {"en": "Hello", "fr": "Bonjour"}},
}


def jsonl(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def one(raw, **how):
    return load([raw], **how).rows[0]


def test_every_shape_has_a_row_here():
    assert sorted(SHAPES) == names("format")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_recognised_and_are_fixed_points(name, tmp_path):
    found = load(jsonl(tmp_path, [SHAPES[name]] * 3))
    assert (
        found.format == name
        and not found.bad
        and [r["id"] for r in found.rows] == [f"rows.jsonl:{i}" for i in (1, 2, 3)]
    )
    again = load(jsonl(tmp_path, found.rows))
    keys = ("id", "prompt", "completions", "scores", "tools", "label")
    assert [{k: r.get(k) for k in keys} for r in again.rows] == [
        {k: r.get(k) for k in keys} for r in found.rows
    ]


def test_what_the_shapes_become():
    rows = {name: one(raw) for name, raw in SHAPES.items()}
    assert (rows["text"]["prompt"], rows["text"]["completions"]) == ("", ["Once upon a time."])
    assert rows["prompt_completion"] == {
        "source": "sums",
        "prompt": "2+2=",
        "completions": [" 4"],
        "id": "rows:1",
    }
    assert rows["messages"]["prompt"] == [USER] and rows["messages"]["completions"] == [[BOT]]
    assert rows["messages"]["tools"] == [{"type": "function", "function": TOOL}]
    assert rows["sharegpt"]["completions"] == [[BOT]]
    assert rows["alpaca"]["prompt"] == [{"role": "user", "content": "Add.\n\n2 and 2"}]
    assert rows["preference"]["completions"] == ["Hello!", "What?"] and rows["preference"]["scores"] == [
        1.0,
        0.0,
    ]
    assert rows["pairwise"]["completions"] == [[BOT], [{"role": "assistant", "content": "What?"}]]
    assert rows["pairwise"]["scores"] == [0.75, 0.25]
    assert rows["unpaired"]["scores"] == [-1.0]
    assert rows["ranked"]["scores"] == [1.0, 7.5]
    assert rows["stepwise"]["completions"] == ["2*3=6\n2+6=9"] and rows["stepwise"]["step_labels"] == [
        True,
        False,
    ]
    assert (rows["labelled"]["completions"], rows["labelled"]["label"]) == (["1"], 1)
    assert rows["table"]["prompt"] == "age is 40; sex is M. What is ill?\nAnswer:"
    assert rows["table"]["completions"] == [" no"]
    assert "completions" not in rows["prompt"] and rows["prompt"]["answer"] == "4"
    assert (
        rows["question_answer"]["completions"] == ["2+2=4\n#### 4"]
        and rows["question_answer"]["answer"] == "4"
    )


SYSTEM, PLEASE = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "What?"}


@pytest.mark.parametrize(
    "raw",
    [
        {"query": "Hi", "response": "Hello!"},  # ms-swift
        {"instruction": "Hi", "context": "", "response": "Hello!", "category": "chat"},  # Dolly
        {"id": "1", "question": "Hi", "response": "Hello!", "system_prompt": ""},  # OpenOrca
        {"prompt": "Hi", "response": "Hello!", "source": "web", "document": "7"},
        {"inputs": "Hi", "targets": "Hello!"},  # P3, FLAN
        {"input": "Hi", "output": "Hello!"},
        {"human": "Hi", "assistant": "Hello!"},
        {"source": "Hi", "target": "Hello!"},
        {"document": "Hi", "summary": "Hello!"},  # XSum
        {
            "contents": [
                {"role": "user", "parts": [{"text": "Hi"}]},
                {"role": "model", "parts": [{"text": "Hello!"}]},
            ]
        },
    ],
    ids=lambda raw: "-".join(raw),
)
def test_usual_names_of_a_request_and_its_response(raw):
    row = one(raw)
    assert row["prompt"] == [USER] and row["completions"] == [[BOT]]
    others = {name: value for name, value in raw.items() if name in ("source", "document", "category")}
    if raw.get("prompt") or raw.get("category"):
        assert others.items() <= row.items(), "what is not read stays a column"


def test_what_stands_beside_a_request_reaches_the_prompt():
    row = one(
        {
            "query": "Hi",
            "response": "Hello!",
            "system": "Be brief.",
            "history": [["a", "b"]],
            "context": "It is late.",
        }
    )
    assert row["prompt"] == [
        SYSTEM,
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "Hi\n\nIt is late."},
    ]
    problem = one({"problem": "1/2 + 1/2?", "solution": r"It is $\boxed{\frac{2}{2}}$, so \boxed{1}."})
    assert problem["answer"] == "1" and problem["completions"][0][0]["content"].startswith("It is")
    assert one({"problem": "1+1?", "solution": "2", "answer": "two"})["answer"] == "two"
    assert "answer" not in one({"problem": "1+1?", "solution": "two"})
    with pytest.raises(BadRow, match="response is missing"):
        build("format", "query_response").row({"query": "Hi", "response": None})
    gemini = one(
        {
            "systemInstruction": {"parts": [{"text": "Be brief."}]},
            "contents": [
                {"role": "user", "parts": [{"text": "Hi"}]},
                {"role": "model", "parts": [{"text": "Hello!"}]},
            ],
        }
    )
    assert gemini["prompt"] == [SYSTEM, USER]


def test_a_request_that_is_a_conversation_takes_the_system_column_and_leaves_the_rest():
    row = one({"prompt": [USER], "response": "Hello!", "system": "Be brief.", "context": "It is late."})
    assert row["prompt"] == [SYSTEM, USER] and row["completions"] == [[BOT]]
    assert row["context"] == "It is late.", "not read, so it stays a column"


@pytest.mark.parametrize(
    "raw",
    [
        {"query": "Hi", "response": "Hello!", "rejected_response": "What?"},  # ms-swift
        {"messages": [USER, BOT], "rejected_response": "What?"},
        {"messages": [USER, BOT], "rejected_response": [PLEASE]},
        {
            "input": {"messages": [USER], "tools": []},
            "preferred_output": [BOT],
            "non_preferred_output": [PLEASE],
        },  # OpenAI
        {"question": "Hi", "response_j": "Hello!", "response_k": "What?"},  # StackExchange
        {"prompt": "Hi", "response_a": "Hello!", "response_b": "What?", "winner": "model_a"},
        {
            "question": "Hi",
            "response_0": "What?",
            "response_1": "Hello!",
            "better_response_id": 1,
        },  # SafeRLHF
        {
            "prompt": "Hi",
            "response_1": "Hello!",
            "response_2": "What?",
            "preference_strength": -2,
        },  # HelpSteer
        {"conversation_a": [USER, PLEASE], "conversation_b": [USER, BOT], "winner": "model_b"},  # LMSYS
    ],
    ids=lambda raw: "-".join(raw),
)
def test_pairs_under_the_names_of_other_tools(raw):
    row = one(raw)
    texts = [c if isinstance(c, str) else c[0]["content"] for c in row["completions"]]
    assert texts == ["Hello!", "What?"] and row["scores"] == [1.0, 0.0]
    assert row["prompt"] in ("Hi", [USER])


@pytest.mark.parametrize(
    "raw",
    [
        {"question": "2+2?", "choices": ["3", "4"], "answer": 1},  # MMLU
        {"question": "2+2?", "choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answerKey": "2"},  # ARC
        {"question": "2+2?", "options": {"A": "3", "B": "4"}, "answer_idx": "B"},  # MedQA
        {"ctx": "2+2?", "endings": ["3", "4"], "label": "1"},  # HellaSwag
        {"question": "2+2?", "options": [3, 4], "answer": "4"},
    ],
    ids=lambda raw: "-".join(raw),
)
def test_choices_reach_the_prompt(raw):
    row = one(raw)
    assert row["prompt"] == "2+2?\nA. 3\nB. 4\nAnswer:"
    assert row["completions"] == [" B"] and row["answer"] == "B"


def test_an_answer_that_is_no_choice_is_set_aside():
    raw = {"question": "2+2?", "choices": ["3", "4"]}
    bad = load([{**raw, "answer": 0}, {**raw, "answer": 2}, {**raw, "answer": "B"}], max_bad_rows=1.0).bad
    assert [b["reason"] for b in bad] == ["answer is '2', which is none of the 2 choices"]


def test_answers_of_squad_are_learned_below_their_passage():
    row = one(
        {
            "context": "It is late.",
            "question": "When?",
            "answers": {"text": ["late", "now"], "answer_start": [6, 0]},
        }
    )
    assert row["prompt"] == "It is late.\n\nWhen?\n" and row["completions"] == ["late"]
    assert row["answers"] == ["late", "now"]


def test_turns_in_other_shapes():
    pair = {"human": "Hi", "assistant": "Hello!"}
    assert one({"conversation": [pair, pair]})["completions"] == [[BOT, USER, BOT]]
    assert one({"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello!"]}})["prompt"] == [USER]
    assert one({"messages": [USER, BOT], "system": "Be brief."})["prompt"] == [SYSTEM, USER]
    greeting = one({"messages": [BOT, USER, PLEASE]})
    assert greeting["prompt"] == [BOT, USER] and greeting["completions"] == [[PLEASE]]


def test_texts_that_repeat_their_prompt_lose_it():
    prompt = "What is the time?"
    row = one({"prompt": prompt, "chosen": prompt + " Noon.", "rejected": prompt + " No."})
    assert row["completions"] == [" Noon.", " No."]
    assert one({"prompt": "Hi", "chosen": "Hi you", "rejected": "Hi!"})["completions"] == ["Hi you", "Hi!"]


def test_ties_and_unknown_verdicts_are_set_aside():
    raw = {"prompt": "Hi", "response_a": "Hello!", "response_b": "What?"}
    bad = load(
        [{**raw, "winner": w} for w in ("model_a", "model_b", "tie", "a", "tie (bothbad)", "nobody")],
        max_bad_rows=1.0,
    ).bad
    assert [b["reason"] for b in bad] == [
        "winner is a tie",
        "winner is a tie",
        "winner is 'nobody'; model_a, model_b or tie is expected",
    ]


def test_directions_of_a_translation():
    raw = {"translation": {"en": "Hello", "fr": "Bonjour", "de": None}}
    assert one(raw)["prompt"] == "Translate from en to fr: Hello\n" and one(raw)["completions"] == ["Bonjour"]
    back = one(raw, format={"name": "translation", "target_lang": "en", "prefix": ""})
    assert (back["prompt"], back["completions"]) == ("Bonjour\n", ["Hello"])
    bad = load([{"translation": {"en": "Hello"}}, raw], max_bad_rows=1.0).bad
    assert [b["reason"] for b in bad] == ["translation has fewer than two languages"]


def test_conversations_with_tools_and_system():
    row = one(
        {
            "conversations": [
                {"from": "human", "value": "Find soup"},
                {"from": "function_call", "value": '{"name": "find", "arguments": {"what": "soup"}}'},
                {"from": "observation", "value": '{"found": 1}'},
                {"from": "gpt", "value": "One soup."},
                {"from": "human", "value": "Thanks"},
            ],
            "system": "Be brief.",
            "tools": json.dumps([TOOL]),
        }
    )
    assert [t["role"] for t in row["prompt"]] == ["system", "user"]
    assert [t["role"] for t in row["completions"][0]] == [
        "assistant",
        "tool",
        "assistant",
    ]  # the last user turn is dropped
    call = row["completions"][0][0]["tool_calls"][0]
    assert call == {"type": "function", "function": {"name": "find", "arguments": {"what": "soup"}}}


def test_preference_pairs_of_every_kind():
    as_turns = {"prompt": [USER], "chosen": [BOT], "rejected": [{"role": "assistant", "content": "What?"}]}
    implied = {"chosen": [USER, BOT], "rejected": [USER, {"role": "assistant", "content": "What?"}]}
    both = {"prompt": "Hi", **implied}
    lf = {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello!"},
        "rejected": {"from": "gpt", "value": "What?"},
    }
    for raw in (as_turns, implied, both, lf):
        row = one(raw)
        assert row["prompt"] == [USER]
        assert [c[0]["content"] for c in row["completions"]] == ["Hello!", "What?"]
    transcript = "\n\nHuman: Hi\n\nAssistant:"
    row = one({"chosen": transcript + " Hello there", "rejected": transcript + " Hello you"})
    assert (row["prompt"], row["completions"]) == (transcript, [" Hello there", " Hello you"])


def test_unpaired_conversations_judge_the_last_turn():
    row = one({"messages": [USER, BOT, USER, {"role": "assistant", "content": "Again?"}], "label": "true"})
    assert len(row["prompt"]) == 3 and row["completions"] == [[{"role": "assistant", "content": "Again?"}]]
    assert row["scores"] == [1.0]


def test_a_label_that_is_no_judgement_leaves_prompt_and_completion():
    assert load([{"prompt": "a", "completion": "b", "label": "sport"}] * 3).format == "prompt_completion"


def test_columns_are_mapped_and_formats_can_be_named():
    raw = {"question": "Why?", "query": "SELECT 1"}
    row = one(raw, columns={"prompt": "question", "completion": "query"})
    assert (row["prompt"], row["completions"]) == ("Why?", ["SELECT 1"])
    gsm = SHAPES["question_answer"]
    assert "completions" not in one(gsm, columns={"prompt": "question"})
    with pytest.raises(
        RecipeError, match="has no column 'quest', which columns: maps; did you mean 'question'"
    ):
        one(gsm, columns={"prompt": "quest"})
    chat = one(gsm, format={"name": "question_answer", "chat": True})
    assert chat["prompt"] == [{"role": "user", "content": "What is 2+2?"}]
    assert chat["completions"][0][0]["role"] == "assistant"


def test_unknown_and_ambiguous_columns():
    with pytest.raises(
        RecipeError, match=r"no format matches the columns buggy, fixed. Nearest: .*columns: \{prompt: buggy"
    ):
        load([{"buggy": "a", "fixed": "b"}])
    with pytest.raises(RecipeError, match="alpaca needs instruction \\+ output"):
        load([{"instruction": "a", "result": "b"}])
    with pytest.raises(RecipeError, match=r"match more than one format \(messages and sharegpt\)"):
        load([{"messages": [USER, BOT], "conversations": [USER, BOT]}])


def test_mixed_files_take_rows_of_the_same_kind_only():
    rows = [SHAPES["alpaca"]] * 60 + [SHAPES["messages"]] + [SHAPES["preference"]]
    found = load(rows)
    assert found.format == "alpaca" and len(found.rows) == 61 and found.rows[60]["completions"] == [[BOT]]
    assert (
        found.bad[0]["where"] == "rows:62"
        and "do not match the file's format, alpaca" in found.bad[0]["reason"]
    )


GOOD = {"messages": [USER, BOT]}


BROKEN = [
    (b'{"messages": [{"role": "user", "content": "Hi', "truncated JSON"),
    (b"messages: hi", "not JSON"),
    (b'["a", "b"]', "not a JSON object"),
    (b'{"messages": "\xff\xfe"}', "not UTF-8 (0xff at byte"),
    (b'{"messages": "a\x00b"}', "contains a NUL byte"),
    (b'{"messages": "a\\u0000b"}', "contains a NUL byte"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogate"),
    (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, "turn 2 of messages (assistant) is empty"),
    (
        {"messages": [USER, {"role": "assistant", "content": " \n "}]},
        "turn 2 of messages (assistant) is only white space",
    ),
    ({"messages": [USER, {"role": "assistant", "content": 7}]}, "turn 2 of messages is a number, not text"),
    ({"messages": [{"role": "narrator", "content": "x"}, BOT]}, "unknown role 'narrator'"),
    ({"messages": [USER]}, "no assistant turn"),
    ({"messages": [BOT, USER]}, "begins with an assistant turn"),
    ({"messages": 7}, "messages is not a list with at least one message"),
    ({"messages": []}, "messages is not a list with at least one message"),
    ({"messages": None, "other": 1}, "do not match the file's format"),
    (
        {"messages": [USER, {"role": "assistant", "content": "x" * 1_000_001}]},
        "longer than 1,000,000 characters",
    ),
    ({"prompt": "x", "chosen": "a", "rejected": "b"}, "do not match the file's format, messages"),
]


def test_each_bad_row_has_its_line_and_its_reason(tmp_path):
    lines = [GOOD] * 400
    for i, (line, _) in enumerate(BROKEN):
        lines.insert(3 + 5 * i, line)
    path = jsonl(tmp_path, lines)
    found = load(path)
    assert len(found.rows) == 400 and found.total == 400 + len(BROKEN)
    told = {b["where"]: b for b in found.bad}
    for i, (_, reason) in enumerate(BROKEN):
        b = told[f"rows.jsonl:{4 + 5 * i}"]
        assert reason in b["reason"], (reason, b["reason"])
        assert len(b["raw"]) <= 500 and b["raw"]
    offset = path.read_bytes().index(b"\xff")
    assert any(b["reason"] == f"not UTF-8 (0xff at byte {offset} of the file)" for b in found.bad)


@pytest.mark.parametrize(
    "raw, reason",
    [
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": "  "}, "completion is only white space"),
        ({"prompt": "a", "completion": True}, "completion is true/false, not text"),
        ({"prompt": float("inf"), "completion": "a"}, "prompt is not a finite number"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"chosen": "abc", "rejected": "xyz"}, "do not start with the same text"),
        ({"prompt": "a", "completion": "b", "label": 0.3}, "label is 0.3, not true or false"),
        ({"prompt": "a", "completions": ["b"], "scores": [1, 2]}, "1 completions but 2 scores"),
        ({"prompt": "a", "completions": ["b"], "scores": [float("nan")]}, "not finite"),
        ({"prompt": "a", "completions": [], "scores": []}, "not a list of completions"),
        ({"instruction": " ", "output": "b"}, "instruction is only white space"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "history is not a list of"),
        ({"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1.5}, "preference is a tie"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{"}]},
            "cannot be parsed",
        ),
        ({"question": "a", "answer": {"b": 1}}, "answer is an object"),
    ],
)
def test_reasons_of_each_format(raw, reason):
    readers = [build("format", n) for n in names("format") if build("format", n).matches(raw)]
    reasons = []
    for reader in readers:
        try:
            reader.row({k: v for k, v in raw.items() if v is not None})
        except BadRow as why:
            reasons.append(str(why))
    assert any(reason in r for r in reasons), reasons


def test_an_empty_list_of_labels_is_no_class_unless_a_label_is_null_beside_it():
    reader = build("format", "labelled")
    assert reader.row({"text": "a", "labels": []})["label"] == []
    with pytest.raises(BadRow, match="label is missing"):
        reader.row({"text": "a", "label": None, "labels": []})


def test_too_many_bad_rows_end_in_one_sentence(tmp_path):
    path = jsonl(tmp_path, [GOOD] * 20 + [b"{"] * 3 + [{"messages": [USER]}])
    with pytest.raises(TooManyBadRows) as told:
        load(path, quarantine=tmp_path / "quarantine.jsonl")
    message = str(told.value)
    assert "4 of 24 rows of" in message and "truncated JSON (3 rows, first rows.jsonl:21)" in message
    assert "(1 row, first rows.jsonl:24)" in message and "quarantine.jsonl" in message
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 4 == len(told.value.bad)
    assert len(load(path, max_bad_rows=0.2).rows) == 20


def test_the_quarantine_is_added_to_and_says_each_row_once(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    bad = [{"where": "a:1", "reason": "x", "raw": "\ud800"}]
    write_quarantine(bad, path)
    write_quarantine([*bad, {"where": "a:2", "reason": "y", "raw": ""}], path)
    assert [json.loads(line)["where"] for line in path.read_text().splitlines()] == ["a:1", "a:2"]
    assert [p.name for p in path.parent.iterdir()] == ["quarantine.jsonl"]


def test_ids_are_kept_and_made_unique():
    found = load([{"text": "a", "id": "x"}, {"text": "b", "id": "x"}, {"text": "c"}, {"text": "d", "id": 7}])
    assert [r["id"] for r in found.rows] == ["x", "x~2", "rows:3", "7"]


def test_kinds_of_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": f"{i}+1=", "completion": f'{i + 1}, "so"\nyes'} for i in range(5)]
    want = [(r["prompt"], [r["completion"]]) for r in rows]
    jsonl(tmp_path, rows)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "rows.jsonl").read_bytes())
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    (tmp_path / "lines.json").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "held.json").write_text(json.dumps({"version": 1, "data": rows}))
    quoted = [",".join('"' + r[k].replace('"', '""') + '"' for k in r) for r in rows]
    (tmp_path / "rows.csv").write_text(
        "\ufeffprompt,completion\r\n" + "\r\n".join(quoted) + "\r\n", encoding="utf-8", newline=""
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in (
        "rows.jsonl",
        "bom.jsonl",
        "rows.jsonl.gz",
        "lines.json",
        "rows.json",
        "held.json",
        "rows.csv",
        "rows.parquet",
    ):
        found = load(tmp_path / name)
        assert [(r["prompt"], r["completions"]) for r in found.rows] == want, name
    (tmp_path / "rows.tsv").write_text('sentence\tlabel\n"quoted"\t1\na "lone quote\t0\n')
    assert [r["prompt"] for r in load(tmp_path / "rows.tsv").rows] == ["quoted\n", 'a "lone quote\n']
    assert [r["id"] for r in load(tmp_path / "rows.csv").rows][:2] == ["rows.csv:2", "rows.csv:4"]


def test_text_files_are_lines_or_running_text(tmp_path):
    (tmp_path / "names.txt").write_text("emma\nolivia\n")
    assert [r["completions"][0] for r in load(tmp_path / "names.txt").rows] == ["emma", "olivia"]
    prose = "\n\n".join(f"Paragraph {i}. " + "word " * 200 for i in range(20))
    (tmp_path / "book.txt").write_text(prose)
    found = load(tmp_path / "book.txt").rows
    assert 4 <= len(found) <= 6 and "".join("".join(r["completions"][0].split()) for r in found) == "".join(
        prose.split()
    )


def test_a_broken_csv_costs_its_own_lines(tmp_path):
    lines = [b"prompt,completion"] + [b"a,b"] * 60
    lines[10:10] = [b'"open,b', b"a,b,c", b"caf\xe9,b"]
    (tmp_path / "rows.csv").write_bytes(b"\n".join(lines))
    found = load(tmp_path / "rows.csv")
    assert len(found.rows) == 60
    assert [(b["where"], b["reason"].partition(" (")[0]) for b in found.bad] == [
        ("rows.csv:11", "a quotation mark is not closed"),
        ("rows.csv:12", "3 cells, but the header has 2 columns"),
        ("rows.csv:13", "not UTF-8"),
    ]


def test_a_broken_json_list_goes_on_behind_the_break(tmp_path):
    parts = ['{"text": "a"}'] * 60
    parts[7] = '{"text": "b"'
    path = tmp_path / "rows.json"
    path.write_text("[\n" + ",\n".join(parts))  # the list itself is not closed either
    found = load(path)
    assert len(found.rows) >= 58 and found.bad[0]["where"] == "rows.json:9"


def test_other_encodings_and_containers_are_told_once(tmp_path):
    (tmp_path / "wide.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16"))
    with pytest.raises(RecipeError, match="is UTF-16, not UTF-8; convert it: iconv"):
        load(tmp_path / "wide.jsonl")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-9])
    with pytest.raises(RecipeError, match="could not be read completely"):
        load(tmp_path / "rows.jsonl.gz")
    (tmp_path / "rows.parquet").write_bytes(b"no")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(os.urandom(9999))[:50] + b"x" * 500)
    with pytest.raises(RecipeError, match="could not be read completely"):
        load(tmp_path / "torn.jsonl.gz")
    with pytest.raises(RecipeError, match="not a valid parquet file"):
        load(tmp_path / "rows.parquet")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(RecipeError, match="has no rows"):
        load(tmp_path / "empty.jsonl")
    with pytest.raises(RecipeError, match=r"file .* does not exist; did you mean 'wide.jsonl'"):
        load(tmp_path / "wode.jsonl")
    with pytest.raises(RecipeError, match="no setting is named 'colums'; did you mean 'columns'"):
        load({"path": "x", "colums": {}})


def test_folders_lists_limits(tmp_path):
    import datasets

    rows = [{"sentence": "fine", "label": 1}, {"sentence": "dull", "label": 0}]
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "splits"))
    found = load(tmp_path / "saved")
    assert [(r["completions"], r["label"]) for r in found.rows] == [(["good"], 1), (["bad"], 0)]
    assert len(load({"path": str(tmp_path / "splits"), "split": "test"}).rows) == 2
    with pytest.raises(RecipeError, match="has no split 'dev'"):
        load({"path": str(tmp_path / "splits"), "split": "dev"})
    path = jsonl(tmp_path, [GOOD] * 9)
    both = load([{"path": str(path), "limit": 2}, str(tmp_path / "saved")])
    assert both.format == "messages + labelled" and len(both.rows) == 4 == both.total
    assert [r["id"] for r in load([str(path)] * 2, limit=1).rows] == ["rows.jsonl:1", "rows.jsonl:1~2"]


def test_dataset_info_of_llama_factory(tmp_path):
    info = {
        "mine": {"file_name": "a.json", "columns": {"prompt": "q", "response": "r", "query": "x"}},
        "pairs": {
            "file_name": "b.json",
            "ranking": True,
            "columns": {"prompt": "q", "chosen": "good", "rejected": "poor"},
        },
        "talk": {
            "file_name": "c.json",
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"},
        },
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "a.json").write_text(json.dumps([{"q": "Add.", "x": "1 1", "r": "2"}]))
    (tmp_path / "b.json").write_text(json.dumps([{"q": "Hi", "good": "Hello!", "poor": "What?"}]))
    (tmp_path / "c.json").write_text(
        json.dumps([{"turns": [{"who": "me", "says": "Hi"}, {"who": "it", "says": "Hello!"}]}])
    )
    place = str(tmp_path / "dataset_info.json")
    assert load(place + ":mine").rows[0]["prompt"] == [{"role": "user", "content": "Add.\n\n1 1"}]
    assert load({"path": place, "name": "pairs"}).rows[0]["scores"] == [1.0, 0.0]
    assert load(place + ":talk").rows[0]["completions"] == [[BOT]]
    with pytest.raises(RecipeError, match="has no data set named 'min' .*; did you mean 'mine'"):
        load(place + ":min")


def test_entries_of_axolotl(tmp_path):
    path = str(
        jsonl(tmp_path, [{"talk": [{"who": "human", "what": "Hi"}, {"who": "gpt", "what": "Hello!"}]}])
    )
    entry = {
        "path": path,
        "type": "chat_template",
        "field_messages": "talk",
        "message_property_mappings": {"role": "who", "content": "what"},
        "roles": {"user": ["human"], "assistant": ["gpt"]},
    }
    assert load([entry]).rows[0]["completions"] == [[BOT]]
    text = str(jsonl(tmp_path, [{"body": "Once."}], "text.jsonl"))
    assert (
        load([{"path": "json", "data_files": text, "type": "completion", "field": "body"}]).rows[0]["prompt"]
        == ""
    )
    assert resolve_source({"path": "x.jsonl", "type": "alpaca"}).format == "alpaca"


def test_names_on_the_hub(monkeypatch):
    import datasets

    asked = []
    rows = datasets.Dataset.from_list([{"text": "a"}] * 3)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or {"train": rows, "test": rows}
    )
    assert len(load({"path": "someone/stories", "split": "test", "limit": 2}).rows) == 2
    assert asked == [(("someone/stories", None), {"split": "test"})]

    def offline(*a, **k):
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        RecipeError,
        match="'someone/stories' is neither a file.* nor a data set that can be loaded: no network$",
    ):
        load("someone/stories")


def test_a_data_set_of_the_hub_brings_its_own_held_out_rows(monkeypatch):
    import datasets

    parts = {}
    for name in ("train", "validation", "test"):
        parts[name] = datasets.Dataset.from_list([{"text": f"{name} {i}"} for i in range(3)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, split=None, **k: parts.get(split, parts))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *a, **k: [*parts])
    data = load_data(Recipe.load({"data": "someone/stories"}))
    assert len(data.rows) == 3
    assert [row["completions"] for row in data.held_out] == [[f"validation {i}"] for i in range(3)]


def test_toy_tasks():
    found = load("toy:arithmetic/test", limit=5)
    assert found.format == "prompt_completion" and len(found.rows) == 5 and found.rows[0]["answer"]
    with pytest.raises(RecipeError, match="toy:arithmetics"):
        load("toy:arithmetics")


def test_equal_prompts_are_never_on_both_sides():
    rows = [
        {"id": str(i), "prompt": f"q{i % 200}" + " " * (i % 3), "completions": [f"a{i}"]} for i in range(2000)
    ]
    train, held = split(rows, 0.1, seed=3)
    assert not {content_key(r) for r in train} & {content_key(r) for r in held}
    assert 0.04 < len(held) / len(rows) < 0.18 and len(train) + len(held) == 2000
    assert split(rows, 0.1, seed=3) == (train, held) and split(rows, 0.1, seed=4)[1] != held
    fewer = [r for r in rows if int(r["id"]) % 2]
    assert {r["id"] for r in split(fewer, 0.1, seed=3)[1]} <= {r["id"] for r in held}
    assert split(rows, 0.0)[1] == [] and all(split(rows[:2], 0.01))


REAL = {
    "tinystories/tinystories.jsonl": "text",
    "corpora/wikitext2.txt": "text",
    "gsm8k/gsm8k.jsonl.gz": "question_answer",
    "math_word/math_word.jsonl": "question_answer",
    "instructions/instruct_en.jsonl.gz": "alpaca",
    "instructions/lima.jsonl.gz": "messages",
    "preference/hh_harmless.jsonl.gz": "preference",
    "preference/dpo_en_demo.jsonl": "preference",
    "preference/kto_en_demo.jsonl": "unpaired",
    "preference/alpacaeval_pairs.jsonl.gz": "pairwise",
    "sst2/sst2.jsonl": "labelled",
    "ag_news/ag_news.jsonl": "labelled",
    "tool_use/glaive_demo.jsonl": "sharegpt",
    "t0_multitask/t0_tasks.jsonl.gz": "prompt_completion",
}


@pytest.mark.parametrize("name", REAL)
def test_real_rows(name):
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not here")
    found = load(DATA / name, limit=500)
    assert found.format == REAL[name] and len(found.rows) >= 0.97 * found.total
    assert len({r["id"] for r in found.rows}) == len(found.rows)
