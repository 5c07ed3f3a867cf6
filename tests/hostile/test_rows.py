"""Files of rows that nobody meant: each row is read or set aside with a reason, and none is lost."""

from __future__ import annotations

import csv
import io
import json
import random
import traceback
import warnings

import pytest

from helpers.hostile import COUNT, SEED, Hang, Tally, hostile_value, limited
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.text.encode import Renderer

pytestmark = pytest.mark.slow
GOOD = 30  # rows of a file that nothing happens to
USER, BOT = {"role": "user", "content": "Hi {}"}, {"role": "assistant", "content": "Hello {}!"}
SHAPES = (
    {"text": "Once upon a time {}."},
    {"prompt": "2+{}=", "completion": " 4"},
    {"messages": [USER, BOT]},
    {"conversations": [{"from": "human", "value": "Hi {}"}, {"from": "gpt", "value": "Hello!"}]},
    {"instruction": "Add {}.", "input": "2 and 2", "output": "4"},
    {"prompt": "Hi {}", "chosen": "Hello!", "rejected": "What?"},
    {"prompt": "Hi {}", "completion": "Hello!", "label": True},
    {"prompt": "Hi {}", "completions": ["Hello!", "What?"], "scores": [1, 0.5]},
    {"prompt": "Hi {}", "completions": ["a", "b"], "labels": [True, False]},
    {"prompt": "Hi {}", "prefix": "So ", "chosen": "a", "rejected": "b"},
    {"text": "a fine film {}", "label": 1},
    {"question": "What is {}+2?", "answer": "it is\n#### 4"},
)
DAMAGE = (
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"{",
    b"}",
    b"[",
    b"\\",
    b"\\u",
    b"\\ud800",
    b",",
    b":",
    b"\t",
    b"",
)


def numbered(shape, i):
    """A shape's row number i."""
    if isinstance(shape, str):
        return shape.replace("{}", str(i))
    if isinstance(shape, list):
        return [numbered(inner, i) for inner in shape]
    if isinstance(shape, dict):
        return {key: numbered(value, i) for key, value in shape.items()}
    return shape


def slots(value, path=()):
    """Every place in a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from slots(inner, (*path, key))


def spoiled(row, chance: random.Random):
    """A row with a cell, a name or a whole column that nobody meant."""
    row = json.loads(json.dumps(row))
    *path, key = chance.choice(list(slots(row)))
    parent = row
    for part in path:
        parent = parent[part]
    change = chance.randrange(5)
    if change < 3:
        parent[key] = hostile_value(chance)
    elif change == 3 and isinstance(parent, dict):
        parent[chance.choice(("\ud800", "a\0", "", " ", "\x1b[2J", "x" * 5000, key))] = parent.pop(key)
    else:
        name = chance.choice(
            (
                "prefix",
                "tools",
                "token_weights",
                "chat_template_kwargs",
                "id",
                "label",
                "scores",
                "source",
                "images",
            )
        )
        row[name] = hostile_value(chance)
    return row


def line_of(row) -> bytes:
    """A row as a line of JSON, whatever is in it."""
    try:
        return json.dumps(row).encode()
    except (ValueError, TypeError, RecursionError):
        return b'{"text": 1' + b"0" * 5000 + b"}"


def damaged(line: bytes, chance: random.Random) -> bytes:
    """A line with some bytes changed, but none of its end."""
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(line) + 1)
        line = line[:place] + chance.choice(DAMAGE) + line[place + chance.randrange(4) :]
    return line.replace(b"\n", b"") or b"x"


def as_csv(rows, chance: random.Random) -> bytes:
    """Rows as a table, cells that are no text as JSON."""
    out = io.StringIO()
    names = list(rows[0])
    writer = csv.writer(out, delimiter=chance.choice(",;\t"))
    writer.writerow(names)
    for row in rows:
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values()])
    return out.getvalue().encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def renderer():
    from transformers import AutoTokenizer

    from luthier.recipe.model_names import resolve_model

    return Renderer(AutoTokenizer.from_pretrained(resolve_model("toy:lm-small")), max_length=64)


def attempt(tally: Tally, source, label: str, renderer, expected: int | None, good: int | None) -> None:
    """Read and encode a source. expected: rows that it holds. good: of them those nothing happened to."""
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load_rows(source, max_bad_rows=1.0)
            answered = [row for row in loaded.rows if row.get("completions")]
            encoded = renderer.encode_all(answered)
    except RecipeError as error:
        if good and expected:
            tally.add("rows lost", f"{label}: all, {str(error)[:300]}")
        else:
            tally.add("refused")
    except Hang:
        tally.add("hangs", f"{label}\n" + "\n".join(traceback.format_exc().strip().splitlines()[-8:]))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename.rpartition('/src/')[2]}:{last.lineno}"
        tally.add("tracebacks", f"{label}: {type(error).__name__}: {str(error)[:150]} at {where}")
    else:
        lost = loaded.total != len(loaded.rows) + len(loaded.bad)
        lost = lost or (expected is not None and loaded.total < expected)
        lost = lost or (good is not None and len(loaded.rows) < good)
        kept = {str(row["id"]).split("#")[0].split("@")[0] for row in encoded.rows}
        aside = {str(bad["where"]).split("#")[0].split("@")[0] for bad in encoded.bad}
        missing = [
            row["id"] for row in answered if str(row["id"]).split("#")[0].split("@")[0] not in kept | aside
        ]
        if lost or missing:
            reasons = [bad["reason"][:80] for bad in loaded.bad[:3]]
            tally.add("rows lost", f"{label}: {len(loaded.rows)} of {expected}, {missing[:3]}, {reasons}")
        tally.add("read, some set aside" if loaded.bad or encoded.bad else "read whole")


def rows_of(chance: random.Random):
    """Good rows of a shape and some spoiled ones among them: (rows, how many are good)."""
    shape = chance.choice(SHAPES)
    rows = [numbered(shape, i) for i in range(GOOD)]
    for _ in range(chance.randint(1, 4)):
        rows.insert(chance.randrange(len(rows)), spoiled(rows[0], chance))
    return rows, GOOD


def test_spoiled_rows_of_files(tmp_path, renderer):
    chance = random.Random(SEED)
    tally = Tally("rows, spoiled cells and names")
    for i in range(COUNT):
        rows, good = rows_of(chance)
        lines = [line_of(row) for row in rows]
        path = tmp_path / chance.choice(("rows.jsonl", "rows.json"))
        if path.suffix == ".json":
            path.write_bytes(b"[" + b",\n".join(lines) + b"]")
        else:
            path.write_bytes(b"\n".join(lines))
        attempt(tally, str(path), f"{i} {path.suffix}", renderer, len(rows), good)
    tally.close()


def test_spoiled_rows_of_python(renderer):
    chance = random.Random(SEED)
    tally = Tally("rows, from Python")
    for i in range(COUNT):
        rows, good = rows_of(chance)
        attempt(tally, rows, str(i), renderer, len(rows), good)
    tally.close()


def test_damaged_lines(tmp_path, renderer):
    chance = random.Random(SEED)
    tally = Tally("rows, damaged lines")
    path = tmp_path / "rows.jsonl"
    for i in range(COUNT):
        shape = chance.choice(SHAPES)
        lines = [line_of(numbered(shape, k)) for k in range(GOOD)]
        for _ in range(chance.randint(1, 4)):
            lines.insert(chance.randrange(1, len(lines)), damaged(lines[0], chance))
        path.write_bytes(b"\n".join(lines))
        expected = sum(bool(line.strip()) for line in lines)
        attempt(tally, str(path), str(i), renderer, expected, GOOD)
    tally.close()


def test_torn_files_of_every_kind(tmp_path, renderer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    chance = random.Random(SEED)
    tally = Tally("rows, torn files")
    for i in range(COUNT):
        rows = [numbered(chance.choice(SHAPES), k) for k in range(3)]
        rows = [numbered(rows[0], k) for k in range(GOOD)]
        kind = chance.choice(("json", "csv", "tsv", "txt", "parquet"))
        path = tmp_path / f"rows.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
            content = path.read_bytes()
        elif kind == "json":
            content = json.dumps(chance.choice((rows, {"data": rows}, {"train": rows}))).encode()
        else:
            content = as_csv(rows, chance)
        for _ in range(chance.randint(1, 6)):
            place = chance.randrange(len(content) + 1)
            piece = chance.choice((*DAMAGE, b"\n", b"\r", b'"', b'""', bytes([chance.randrange(256)])))
            content = content[:place] + piece + content[place + chance.randrange(3) :]
        if chance.random() < 0.2:
            content = content[: chance.randrange(len(content) + 1)]
        path.write_bytes(content)
        attempt(tally, str(path), f"{i} {kind}", renderer, None, None)
    tally.close()
