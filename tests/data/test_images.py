"""Images of rows: every layout becomes the same canonical row, and none that is broken ends a run."""

from __future__ import annotations

import base64

import pytest

from luthier.data.images import with_images, without_paths
from luthier.data.load import load_rows
from luthier.data.split import split
from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow

PIL = pytest.importorskip("PIL.Image")
ASKED = {"type": "text", "text": "What is it?"}
REPLY = {"role": "assistant", "content": "red"}


@pytest.fixture
def red(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = PIL.new("RGB", (4, 4), "red")
    image.save(tmp_path / "red.png")
    return image


def talk(content, **columns) -> dict:
    return {"messages": [{"role": "user", "content": content}, REPLY], **columns}


def test_every_layout_is_the_same_row(red, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = (tmp_path / "red.png").read_bytes()
    address = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    layouts = [
        talk([{"type": "image"}, ASKED], images=[red]),
        talk([{"type": "image"}, ASKED], images=[{"bytes": content, "path": None}]),
        talk([{"type": "image", "image": str(tmp_path / "red.png")}, ASKED]),
        talk([{"type": "image_url", "image_url": {"url": address}}, ASKED]),
        talk("<image>\nWhat is it?", images=["red.png"]),
        talk("What is it?", image="red.png"),
        {
            "conversations": [
                {"from": "human", "value": "<image>What is it?"},
                {"from": "gpt", "value": "red"},
            ],
            "image": "red.png",
        },
        {"prompt": "What is it?", "completion": "red", "images": [tmp_path / "red.png"]},
    ]
    for raw in layouts:
        (row,) = load_rows([raw]).rows
        assert row["prompt"] == [{"role": "user", "content": [{"type": "image"}, ASKED]}], raw
        assert [turn["content"] for turn in row["completions"][0]] == ["red"]
        with PIL.open(row["images"][0]) as image:
            assert image.size == (4, 4) and "image" not in row
    (pair,) = load_rows(
        [{"prompt": "What?", "chosen": "red", "rejected": "blue", "images": ["red.png"]}]
    ).rows
    assert len(pair["completions"]) == 2 and pair["prompt"][0]["content"][0] == {"type": "image"}


def test_paths_are_relative_to_the_data_file(red, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What?", "completion": "red", "images": ["red.png"]}\n')
    (row,) = load_rows(str(tmp_path / "rows.jsonl")).rows
    assert row["images"] == [str(tmp_path / "red.png")]


def test_words_in_a_column_called_image_are_no_image(red):
    (row,) = load_rows([talk("What is it?", image="a bird")]).rows
    assert row["image"] == "a bird" and "images" not in row


BROKEN = [
    "a" * 5000,
    5,
    True,
    {"x": 1},
    [[]],
    {"bytes": b""},
    "data:image/png;base64,@@",
    "https://a/b.png",
    "",
]


@pytest.mark.parametrize("value", BROKEN, ids=lambda value: str(value)[:12])
def test_no_broken_image_ends_a_run(value, red):
    rows = [
        talk("Hi", images=[value]),
        talk("Hi", image=value),
        talk([{"type": "image", "image": value}, ASKED]),
    ]
    loaded = load_rows([*rows, *[talk("Hi")] * 97])
    assert len(loaded.rows) + len(loaded.bad) == 100 and len(loaded.rows) >= 97


def test_marks_and_images_must_agree(red):
    for content, images in (("<image>?", [red, red]), ("<image><image>?", [red])):
        with pytest.raises(RecipeError, match="marks"):
            load_rows([talk(content, images=images)])


def test_whoever_sends_turns_has_no_file_read(red, tmp_path):
    path = str(tmp_path / "red.png")
    for image in (path, {"url": path}, f"file://{path}", {"url": {"path": path}}):
        turns = [{"role": "user", "content": [{"type": "image_url", "image_url": image}, ASKED]}]
        with pytest.raises(BadRow, match="must be sent"):
            without_paths(turns)
        assert with_images({"prompt": turns})["images"] == [path]


def test_rows_with_one_question_are_held_out_by_their_images():
    rows = [{"prompt": "What?", "completions": ["x"], "images": [f"/data/{i}/a.png"]} for i in range(400)]
    train, held_out = split(rows, 0.1)
    assert len(train) + len(held_out) == 400 and 30 < len(held_out) < 50
    elsewhere = [{**row, "images": [f"/mnt{row['images'][0]}"]} for row in rows]
    assert [row["images"][0][4:] for row in split(elsewhere, 0.1)[1]] == [
        row["images"][0] for row in held_out
    ]
