"""How many rows are held out, and which."""

from __future__ import annotations

import json

import pytest

import luthier
from luthier.data import load
from luthier.data.load import load_data
from luthier.data.split import former_split, sample, split


def rows_of(n: int, prompts: int | None = None) -> list[dict]:
    """Rows with so many different prompts, by default all."""
    return [{"prompt": f"What is {i % (prompts or n)}?", "completion": f" {i}."} for i in range(n)]


@pytest.mark.parametrize(("n", "share"), [(60, 0.1), (60, 0.05), (20, 0.05), (10, 0.05), (11, 0.3)])
def test_a_share_of_few_rows_is_that_share(n, share):
    rows = [{"id": str(i), "prompt": f"q{i}", "completions": ["a"]} for i in range(n)]
    for seed in range(20):
        train, held_out = split(rows, share, seed)
        assert len(train) + len(held_out) == n
        count = max(1, n * share)
        assert abs(len(held_out) - count) <= max(0.5, 0.2 * count)


def test_rows_of_one_prompt_are_never_divided():
    rows = [{"id": str(i), "prompt": f"q{min(i, 9)}", "completions": ["a"]} for i in range(60)]
    train, held_out = split(rows, 0.1)
    assert len(held_out) == 6 and all(row["prompt"] != "q9" for row in held_out)
    assert split([{**row, "prompt": "q"} for row in rows], 0.5)[1] == []
    pairs = [{"id": str(i), "prompt": f"q{i % 2}", "completions": ["a"]} for i in range(20)]
    assert [len(side) for side in split(pairs, 0.05)] == [10, 10]


@pytest.mark.parametrize(
    ("n", "share", "count"),
    [(10, 0.05, 1), (9, 0.05, 0), (5, 0.2, 1), (4, 0.25, 1), (60, 0.05, 3), (60, "auto", 6), (9, "auto", 0)],
)
def test_some_rows_are_held_out_of_ten_or_more(n, share, count):
    data = load_data(luthier.Recipe(data=rows_of(n), eval_data=share))
    assert (len(data.held_out), len(data.rows)) == (count, n - count)


def test_rows_of_a_run_that_began_earlier_keep_their_side():
    recipe = luthier.Recipe(data=rows_of(60), eval_data=0.1)
    now = load_data(recipe)
    rows = [*now.rows, *now.held_out]
    rows.sort(key=lambda row: int(row["id"].partition(":")[2]))
    former = former_split(rows, 0.1)
    assert len(former[1]) != 6
    from luthier.data.load import fingerprint_of

    before = load_data(recipe, fingerprint=fingerprint_of(*former))
    assert (before.rows, before.held_out) == former and before.fingerprint == fingerprint_of(*former)
    assert load_data(recipe, fingerprint="0123456789abcdef") == now


SHORT = {"model": "toy:lm-small", "max_steps": 2, "eval_steps": 1, "max_length": 64, "evaluate": ["loss"]}


def test_without_held_out_rows_nothing_says_held_out(tmp_path):
    report = luthier.tune({**SHORT, "data": rows_of(12), "eval_data": 0, "overwrite": True}, folder=tmp_path)
    assert report.stats["measured_on"] == "training rows"
    assert any("no rows are held out; metrics are measured on training rows" in note for note in report.notes)
    page = (tmp_path / "report.html").read_text()
    shown = (
        page.partition("The whole recipe")[0].replace("no rows are held out", "").replace("0 held out", "")
    )
    shown = shown.replace("there are no held-out rows", "")
    assert "training rows" in shown and "held-out" not in shown.partition("<script")[0]
    assert "held-out" not in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["measured_on"] == "training rows"


def test_counts_of_rows_add_up(tmp_path):
    rows = [*rows_of(30), {"prompt": "What?", "completion": 3.5, "label": [1]}]
    report = luthier.tune({**SHORT, "data": rows, "eval_data": 0.2, "max_bad_rows": 0.5}, folder=tmp_path)
    counts = report.stats["row_counts"]
    assert counts["read"] == len(rows) == counts["training"] + counts["held_out"] + counts["unreadable"]
    assert (counts["held_out"], report.stats["data_rows"]) == (
        report.stats["held_out_rows"],
        counts["training"],
    )
    assert (
        f"{counts['read']} rows read: {counts['training']} for training"
        in (tmp_path / "report.html").read_text()
    )


def test_a_sample_is_the_same_rows_in_their_order_whatever_comes_later():
    rows = [{"id": str(i), "prompt": f"q {i}"} for i in range(50)]
    some = sample(rows, 10)
    numbers = [int(row["id"]) for row in some]
    assert len(some) == 10 and numbers == sorted(numbers) and numbers != list(range(10))
    assert sample(some, 10) is some
    more = sample([*rows, {"id": "50", "prompt": "q 50"}], 11)
    assert len([row for row in some if row in more]) >= 9


def test_of_many_rows_no_more_than_enough_are_held_out(monkeypatch):
    """Metrics read some hundred rows; nobody would learn from the rest of a twentieth of a large file.
    A share that is written stays, and so do the sides of a run that began under the former default.
    """
    assert load.default_share(60_000) * 60_000 == pytest.approx(2000)
    assert load.default_share(10_000) == 0.05
    monkeypatch.setattr(load, "MOST", 20)
    rows = rows_of(800)
    open_share = load_data(luthier.Recipe(data=rows))
    written = load_data(luthier.Recipe(data=rows, eval_data=0.05))
    assert 16 <= len(open_share.held_out) <= 24
    assert 32 <= len(written.held_out) <= 48
    before = load_data(luthier.Recipe(data=rows), fingerprint=written.fingerprint)
    assert (before.rows, before.held_out) == (written.rows, written.held_out)
