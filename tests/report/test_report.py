"""What a run leaves for people: the page, the card, the table; nothing invented, nothing that escapes its
place.
"""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from helpers.browser import CHROMIUM, Browser
from luthier.recipe.recipe import Recipe
from luthier.report.chart import Curve, curves_figure, curves_table, smoothed, thinned
from luthier.report.console import Callback, Console
from luthier.report.html import marked, script, script_hash
from luthier.report.numbers import (
    cost,
    damaged_generations,
    format_duration,
    format_number,
    generations,
    headline,
    metric_of,
    metric_row,
    metric_rows,
)
from luthier.report.page import page, shown_generations, write_report
from luthier.report.text import MARKS
from luthier.run.run import Report
from luthier.storage import files

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


VOID = {"meta", "br", "input", "img", "link", "hr"}


class Tree(HTMLParser):
    """Checks that tags close, and gathers tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.words = [], [], [], ""
        self.scripts, self.data = [], []  # what runs, and JSON that a script reads
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> where {self.open[-1:]} was open"

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            kind = next(
                value for tag, key, value in reversed(self.attributes) if (tag, key) == ("script", "type")
            )
            (self.data if kind == "application/json" else self.scripts).append(data)
        elif self.open[-1:] != ["style"]:
            self.words += data


def a_report(folder, **changes) -> Report:
    known = dict(
        before={"loss": 2.31, "accuracy": 0.03, "retention_accuracy": 0.97, "retention_accuracy/chat": 0.9},
        after={"loss": 0.42, "accuracy": 0.98, "retention_accuracy": 0.94, "retention_accuracy/chat": 0.9},
        losses=[2.0, 1.0, 0.5],
        stats={
            "moving": 1000,
            "all": 100_000,
            "tokens": 5000,
            "supervised": 2000,
            "seconds": 2.0,
            "steps": 3,
            "peak_memory_mb": 512.0,
            "measured_on": "held-out rows",
            "held_out_rows": 20,
            "supervised_share": 0.4,
            "data_rows": 100,
            "row_tokens": 5000,
        },
        notes=["something was understood"],
    )
    return Report(str(folder), **{**known, **changes})


LOGGED = [
    {
        "step": i + 1,
        "loss": 2.0 / (i + 1),
        "learning_rate": 1e-4,
        "tokens": 100,
        "seconds": 0.1,
        "reward": i % 2,
    }
    for i in range(30)
]


@pytest.fixture
def made(tmp_path):
    recipe = Recipe.load({"data": "rows.jsonl", "model": "toy:lm", "seed": 7})
    write_report(recipe, a_report(tmp_path), LOGGED, tmp_path)
    return tmp_path


def test_the_page_answers_first_and_is_whole(made):
    text = (made / "report.html").read_text(encoding="utf-8")
    tree = Tree(text)
    assert tree.tags.count("h1") == 1
    answer = "Held-out loss 2.31 → 0.42; sequence accuracy 3.0% → 98.0%; retention accuracy 97.0% → 94.0%."
    assert answer in tree.words
    for words in (
        "Evaluation",
        "Training",
        "learning rate",
        "reward",
        "Reproduce",
        "Warnings and notes",
        "trainable parameters",
        "supervised tokens",
        "seed: 7",
    ):
        assert words in tree.words
    assert "2,500 tokens/s" in tree.words and "1K of 100K (1%)" in tree.words
    assert text.index("<h1>") < text.index("<table") < text.index("<figure data-chart")


def test_parts_of_a_metric_are_a_table_of_their_own(made):
    text = (made / "report.html").read_text(encoding="utf-8")
    whole, parts = text.split("Retention accuracy by task (1)")
    assert '<th scope="row">retention accuracy</th>' in whole and ">chat</th>" not in whole
    assert '<th scope="row">chat</th><td>90.0%</td><td>90.0%</td>' in parts


def test_the_page_needs_no_network_and_runs_its_own_script_only(made):
    text = (made / "report.html").read_text(encoding="utf-8")
    tree = Tree(text)
    assert "link" not in tree.tags and "img" not in tree.tags and "iframe" not in tree.tags
    assert not [
        a
        for a in tree.attributes
        if a[1] in ("src", "href", "srcset", "data", "action") or a[1].startswith("on")
    ]
    assert tree.scripts == [script()]
    assert not re.search(
        r"fetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|\bimport\b|\beval\(", script()
    )
    rest = text.replace(script(), "")
    assert "http://" not in rest and "https://" not in rest and "url(" not in rest and "@import" not in rest
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {script_hash()}"
    assert ("meta", "content", policy) in tree.attributes
    assert "prefers-color-scheme:dark" in text and "@media print" in text and "width=device-width" in text


def test_the_page_says_all_without_a_script(made):
    """What a chart shows stands in a table beside it, which is open until a script folds it away."""
    text = (made / "report.html").read_text(encoding="utf-8")
    table = text.split('<details class="fallback" open>')[1].split("</details>")[0]
    assert '<th scope="col">loss</th>' in table and '<th scope="col">learning rate</th>' in table
    assert '<th scope="row">1</th><td>2.00</td>' in table and '<th scope="row">30</th><td>0.067</td>' in table


def test_user_text_stays_text(tmp_path):
    sample = {"id": "1", "prompt": EVIL, "expected": EVIL, "answer": EVIL, "score": 0.0}
    for when in ("before", "after"):
        (tmp_path / f"samples-{when}.jsonl").write_text(json.dumps(sample) + "\n")
    (tmp_path / "shown.json").write_text(json.dumps([f"{EVIL}{MARKS[0]}{EVIL}{MARKS[1]}"]))
    recipe = Recipe.load({"data": [{"prompt": EVIL, "completion": EVIL}], "model": EVIL})
    report = a_report(
        tmp_path, notes=[EVIL], before={EVIL: 1.0, f"retention_accuracy/{EVIL}": 0.5}, after={EVIL: 2.0}
    )
    key = EVIL.replace("/", "")  # with it, a part of a metric
    logged = [{**x, key: x["step"]} for x in LOGGED]
    tree = Tree(page(recipe, report, logged, tmp_path))
    assert "img" not in tree.tags and tree.scripts == [script()]
    assert tree.tags.count("script") == 1 + len(tree.data) and len(tree.data) > 1
    assert any(json.loads(text)["label"] == key for text in tree.data)
    assert not [a for a in tree.attributes if a[1].startswith("on")]
    assert tree.words.count(EVIL) >= 8  # shown as it was written
    write_report(recipe, report, logged, tmp_path)
    body = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    assert not re.search(r"(?<!\\)<(script|img)", body)


def test_a_bare_run_makes_a_page_too(tmp_path):
    recipe = Recipe.load({"objective": None, "tuner": "full"})
    tree = Tree(page(recipe, Report(str(tmp_path), stats={"steps": 0}), [], tmp_path))
    assert "Nothing was trained." in tree.words
    assert not {"figure", "table"} & set(tree.tags)


def test_losses_that_are_no_numbers_or_negative_do_not_break_curves(tmp_path):
    logged = [{"step": 1, "loss": -1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 0.5}]
    text = page(Recipe(), a_report(tmp_path), logged, tmp_path)
    loss = json.loads(Tree(text).data[0])
    assert loss["series"][0]["points"] == [[1, -1.0], [3, 0.5]] and "NaN" not in text
    assert loss["log"] is False  # a logarithm of a negative loss is not offered
    positive = page(Recipe(), a_report(tmp_path), LOGGED, tmp_path)
    assert json.loads(Tree(positive).data[0])["log"] is True


@pytest.mark.long
def test_a_long_recipe_is_cut(tmp_path):
    recipe = Recipe.load({"data": [{"prompt": f"{i} " * 30, "completion": "x"} for i in range(2000)]})
    assert len(page(recipe, a_report(tmp_path), LOGGED, tmp_path)) < 200_000


def test_marks_that_a_cut_parted_still_close():
    text = "a" * 10 + MARKS[0] + "b" * 9000 + MARKS[1] + "c"
    Tree(marked(text))
    assert marked(f"x{MARKS[0]}y{MARKS[1]}z") == "x<mark>y</mark>z"


def test_the_card_is_one_the_hub_reads(made):
    _, front, body = (made / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    known = yaml.safe_load(front)
    assert (
        known["license"] == "apache-2.0"  # the base model's
        and "luthier" in known["tags"]
        and "lora" in known["tags"]
        and "sft" in known["tags"]
    )
    # a built-in model is not on the hub
    assert known["library_name"] == "luthier" and "base_model" not in known
    assert "luthier.load" in body and "| loss | 2.31 | 0.42 | −1.89 |" in body
    (made / "adapter_config.json").write_text("{}")
    write_report(Recipe(model="org/name"), a_report(made), [], made)
    front = yaml.safe_load((made / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert front["base_model"] == "org/name" and front["library_name"] == "peft"


def test_a_folder_of_this_machine_is_not_told_to_the_world(tmp_path):
    write_report(Recipe(model=str(tmp_path / "secret" / "base")), a_report(tmp_path), [], tmp_path)
    assert str(tmp_path) not in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("x", "share", "said"),
    [
        (2.3, False, "2.30"),
        (0.0123, False, "0.012"),
        (1234.5, False, "1,234"),
        (0.981, True, "98.1%"),
        (None, False, ""),
    ],
)
def test_numbers_read_well(x, share, said):
    assert format_number(x, share) == said


def test_what_is_better_depends_on_the_metric():
    assert metric_row("loss", 2.0, 1.0).better is True and metric_row("loss", 1.0, 2.0).better is False
    assert metric_row("accuracy", 0.1, 0.9).better is True and metric_row("accuracy", 0.5, 0.5).better is None
    assert metric_row("accuracy", 0.1, 0.9).change == "+80.0 points"
    assert metric_row("somebody_elses", 1.0, 2.0).better is None
    assert metric_row("loss", 2.0, None).change == "" and metric_row("loss", 2.0, None).after == ""


def test_a_mean_over_rows_has_the_interval_of_its_change(tmp_path):
    values = {"loss": {str(i): 2.0 + i % 3 for i in range(30)}, "accuracy": {"0": 0.0, "1": 1.0}}
    files.write_json(tmp_path / "per_example-before.json", values)
    after = {"loss": {str(i): 1.0 + i % 3 + i % 2 for i in range(30)}, "accuracy": {"other": 0.0}}
    files.write_json(tmp_path / "per_example-after.json", after)
    report = a_report(tmp_path, before={"loss": 3.0, "accuracy": 0.5}, after={"loss": 2.5, "accuracy": 0.5})
    loss, accuracy = sorted(metric_rows(report), key=lambda row: row.name != "loss")
    assert loss.interval == "−0.69 to −0.31" and accuracy.interval == ""  # others than those before


def test_nothing_is_said_that_was_not_measured(tmp_path):
    bare = a_report(tmp_path, before={"loss": 2.0}, after={"loss": 1.0}, stats={"steps": 3})
    assert headline(bare) == "Held-out loss 2.00 → 1.00."
    assert list(cost({"steps": 3})) == [("steps", "3")]
    assert [x.name for x in metric_rows(bare)] == ["loss"]
    trained = a_report(tmp_path, stats={"steps": 3, "measured_on": "training rows"})
    assert headline(trained).startswith("Loss on the training rows")
    assert (
        format_duration(3723) == "1 h 2 min"
        and format_duration(75) == "1 min 15 s"
        and format_duration(2.34) == "2.3 s"
    )


def test_answers_are_matched_by_row(tmp_path):
    for when, ids in (("before", "ab"), ("after", "bc")):
        text = "".join(
            json.dumps({"id": i, "prompt": i, "expected": None, "answer": when + i, "score": None}) + "\n"
            for i in ids
        )
        (tmp_path / f"samples-{when}.jsonl").write_text(text)
    found = {a["prompt"]: (a["before"], a["after"]) for a in generations(tmp_path)}
    assert found == {"a": ("beforea", None), "b": ("beforeb", "afterb"), "c": (None, "afterc")}
    assert not damaged_generations(tmp_path)
    (tmp_path / "samples-before.jsonl").write_bytes(b"\xff\xfe")
    with open(tmp_path / "samples-after.jsonl", "a") as file:
        file.write('{"id": "d", "pro\n[1]\n')
    assert [row["id"] for row in generations(tmp_path)] == ["b", "c"]
    assert damaged_generations(tmp_path) == [
        "samples-before.jsonl is damaged: 1 of its lines cannot be read",
        "samples-after.jsonl is damaged: 2 of its lines cannot be read",
    ]
    assert "2 of its lines" in shown_generations(tmp_path)["note"]


def test_a_curve_keeps_its_spikes_and_its_mean():
    flat = [(i, 1.0) for i in range(10_000)]
    flat[5000] = (5000, 99.0)
    few = thinned(flat)
    assert len(few) <= 802 and (5000, 99.0) in few
    assert all(y == pytest.approx(1.0) for _, y in smoothed([(i, 1.0) for i in range(100)]))
    assert smoothed([(1, 3.0)]) == [(1, 3.0)]
    assert curves_figure("x", [Curve("x", "raw", [])]) is None


def test_a_table_of_curves_has_every_point_of_a_sparse_one():
    dense, sparse = (
        Curve("loss", "raw", [(i, float(i)) for i in range(1000)]),
        Curve("held", "held", [(7, 1.0), (501, 2.0)]),
    )
    table = curves_table([dense, sparse, Curve("none", "raw", [])])
    assert table["head"] == ["step", "loss", "held"] and len(table["rows"]) == 16
    assert (
        ["7", "7.00", "1.00"] in table["rows"]
        and table["rows"][0][0] == "0"
        and table["rows"][-1][0] == "999"
    )


def test_metrics_of_old_run_folders_are_read():
    assert metric_of("elsewhere_loss").label == metric_of("retention_loss").label
    assert metric_of("retention_accuracy/chat").label == "retention accuracy: chat"
    assert (
        metric_of("somebody_elses").label == "somebody elses" and metric_of("somebody_elses").better is None
    )
    assert (
        metric_of("hypervolume(a, b)").higher_is_better and not metric_of("sparsity(a, b)").higher_is_better
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    assert opened.said == []
    opened.end()


def show(browser, folder, logged):
    recipe = Recipe.load({"data": "rows.jsonl", "model": "practice:lm"})
    path = folder / "shown.html"
    path.write_text(page(recipe, a_report(folder), logged, folder), encoding="utf-8")
    browser.go(path.as_uri())
    drawn = "document.querySelectorAll('figure canvas').length"
    browser.see(f"document.title && {drawn} > 0 && {drawn} === document.querySelectorAll('figure').length")


def mouse(browser, kind, x, y, **how):
    browser.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, **how)


PLOT = """(() => { const r = document.querySelector('.u-over').getBoundingClientRect();
  return [r.left, r.top, r.width]; })()"""


STEP = "document.querySelector('.u-value').textContent"


@needs_browser
def test_hover_shows_values_and_a_drag_zooms(browser, tmp_path):
    show(browser, tmp_path, LOGGED)
    assert browser.run(STEP) == "30"  # the last, while nothing is hovered
    assert not browser.run("document.querySelector('details.fallback').open")
    browser.run("document.querySelector('figure').scrollIntoView()")
    left, top, width = browser.run(PLOT)
    mouse(browser, "mouseMoved", left + 2, top + 50)
    browser.see(f"{STEP} === '1'")
    mouse(browser, "mousePressed", left + width / 2, top + 50)
    mouse(browser, "mouseMoved", left + width * 0.75, top + 50, buttons=1)
    mouse(browser, "mouseReleased", left + width * 0.75, top + 50)
    left, top, _ = browser.run(PLOT)
    mouse(browser, "mouseMoved", left + 2, top + 50)
    browser.see(f"{STEP} === '16'")
    browser.press("log")
    browser.see("document.querySelector('.scale [aria-pressed=true]').textContent === 'log'")
    assert browser.run("document.querySelectorAll('figure canvas').length") == 3


COLOURED = """(() => { const c = document.querySelector('figure canvas');
  const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, xs = [];
  for (let i = 0; i < d.length; i += 4)
    if (d[i] === 0xa4 && d[i + 1] === 0x50 && d[i + 2] === 0x1f) xs.push(i / 4 % c.width);
  return [xs.length, Math.max(...xs) - Math.min(...xs)]; })()"""


@needs_browser
def test_a_single_value_is_a_point(browser, tmp_path):
    browser.media(False)
    show(browser, tmp_path, LOGGED[:1])
    count, width = browser.run(COLOURED)
    assert count > 5 and width < 10
    show(browser, tmp_path, LOGGED)
    assert browser.run(COLOURED)[1] > 500


@needs_browser
def test_the_page_in_the_dark_on_a_phone_and_on_paper(browser, tmp_path):
    show(browser, tmp_path, LOGGED)
    browser.resize(380)
    assert browser.run("document.documentElement.scrollWidth") <= 380
    browser.media(True)
    browser.see(f"{COLOURED}[0] === 0")  # drawn again in the colours of the dark
    browser.media(True, "print")
    browser.see(f"{COLOURED}[0] > 0")
    browser.media()
    browser.resize(1000)


class Roles:
    class renderer:
        @staticmethod
        def decode_marked(row, marks):
            return f"{row['prompt']}{marks[0]}{row['said']}{marks[1]}"


def test_at_a_pipe_ten_lines_and_no_colours(tmp_path):
    out = io.StringIO()
    console = Console(out)
    console.warn("a [bold]sentence[/bold] with marks")
    console.rows(Roles, [{"prompt": "2+2=", "said": " 4"}], {"row_tokens": 5, "supervised_share": 0.4})
    with console.training(100, 0):
        for i in range(100):
            console.step({"step": i + 1, "loss": 1.0, "tokens": 50, "seconds": 0.01})
    report = a_report(tmp_path)
    console.finish(report)
    said = out.getvalue()
    assert (
        "\x1b" not in said
        and "[bold]sentence[/bold]" in said
        and console.notes == ["a [bold]sentence[/bold] with marks"]
    )
    assert "2+2=⟦ 4⟧" in said and "40% supervised" in said
    assert len(re.findall(r"^step \d+/100", said, re.M)) == 10
    assert "5,000 tokens/s" in said and re.search(r"\d s left", said)
    table = [[c.strip() for c in x.split("|")] for x in said.splitlines() if x.startswith("|")]
    assert ["", "loss", "2.31", "0.42", "−1.89", ""] in table
    assert ["", "retention accuracy", "97.0%", "94.0%", "−3.0 points", ""] in table
    parts = table.index(["", "retention accuracy by task", "before", "after", "change", ""])
    assert table.index(["", "chat", "90.0%", "90.0%", "same", ""]) > parts


def test_at_a_pipe_a_long_run_tells_its_length_early(monkeypatch):
    """Steps of ten seconds: the first line comes after two, the next ones ever more rarely; the ten of
    every run come as well.
    """
    now = [0.0]
    monkeypatch.setattr("luthier.report.console.time.perf_counter", lambda: now[0])
    out = io.StringIO()
    console = Console(out)
    with console.training(1000, 0):
        for i in range(300):
            now[0] += 10.0
            console.step({"step": i + 1, "loss": 1.0, "tokens": 50, "seconds": 10.0})
    steps = [int(step) for step in re.findall(r"^step (\d+)/1000", out.getvalue(), re.M)]
    assert steps[:5] == [2, 5, 11, 23, 47]
    assert len(steps) < 12
    assert re.search(r"^step 2/1000 .*left", out.getvalue(), re.M)


def test_at_a_terminal_a_bar_and_colours(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = io.StringIO()
    console = Console(out)
    with console.training(10, 4):
        console.step({"step": 5, "loss": 1.0, "tokens": 50, "seconds": 0.01})
        console.warn("told beside the bar")
    assert "\x1b[" in out.getvalue() and "5/10" in out.getvalue() and "told beside the bar" in out.getvalue()


def test_what_a_model_writes_cannot_steer_the_terminal(tmp_path):
    sample = {
        "id": "1",
        "prompt": "p\x1b[2J",
        "expected": None,
        "answer": "\x1b]0;title\x07\x9b31m",
        "score": None,
    }
    (tmp_path / "samples-after.jsonl").write_text(json.dumps(sample) + "\n")
    out = io.StringIO()
    Console(out).finish(a_report(tmp_path))
    Console(out).warn("\x1b[31mred")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out.getvalue()) and "␛" in out.getvalue()


def test_quiet_keeps_what_was_told(capsys):
    quiet = Callback()
    quiet.warn("one")
    with quiet.training(3, 0):
        quiet.step({"step": 1})
    quiet.finish(Report("x"))
    assert quiet.notes == ["one"] and capsys.readouterr().out == ""


@pytest.mark.long
def test_answers_may_hold_any_mark(tmp_path):
    said = "a\x85b\u2028c\x0cd"
    line = json.dumps({"id": "r", "prompt": "p", "expected": "e", "answer": said}, ensure_ascii=False)
    (tmp_path / "samples-after.jsonl").write_text(line + "\n", encoding="utf-8")
    assert generations(tmp_path)[0]["after"] == said
