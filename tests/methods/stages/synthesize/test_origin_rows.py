"""origin_rows: inputs of the data set are yes, those that were written from its seeds are no."""

from __future__ import annotations

from helpers.synthesis import Scripted, nobody
from luthier.registry import build

ROWS = [{"id": str(k), "prompt": f"what is {k}?", "completions": [str(k)]} for k in range(8)]


def test_rows_are_yes_and_written_inputs_no():
    writer = Scripted(lambda prompt, seed: " what is 3?" if seed % 4 == 0 else f" input {seed}\n\nInput: x")
    settings = {"name": "origin_rows", "writer": writer, "seeds": 3, "dataset": "numbers"}
    out = list(build("stage", settings)(ROWS, nobody()))
    yes = [row for row in out if row["completions"] == [" yes"]]
    no = [row for row in out if row["completions"] == [" no"]]
    assert len(yes) == 8 and len(yes) + len(no) == len(out) and 2 <= len(no) <= 8
    question = "Is the above question from numbers?"
    assert [row["prompt"] for row in yes] == [f"{row['prompt']}\n{question}" for row in ROWS]
    for row in no:
        text, asked = row["prompt"].split("\n")
        assert text.startswith("input ") and asked == question
    (prompt,) = {*writer.prompts}
    seeds = [line for line in prompt.split("\n\n") if line.startswith("Input: what is ")]
    assert len(seeds) == 3 and prompt.endswith("Input:")
    drawn = build("stage", {"name": "random_rows", "n": 3})(ROWS, nobody())
    assert sorted(seeds) == sorted(f"Input: {row['prompt']}" for row in drawn), "the seeds of a transfer"
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    first = next(iter(build("stage", settings)(chats, nobody())))
    assert first["prompt"] == [{"role": "user", "content": f"what is 0?\n{question}"}]
    assert first["completions"] == [[{"role": "assistant", "content": "yes"}]]
