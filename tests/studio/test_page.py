"""The studio's page in a browser: by keyboard alone, read aloud, in the dark, on a phone, on paper; answers
that grow, curves together.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

from helpers.browser import CHROMIUM, Browser
from luthier.studio import listening, server
from luthier.studio.worker import Here

pytest.importorskip("fastapi")


TOKEN = "a-token-for-tests"


MODEL = "toy:lm-small"


HOSTILE = "<script>window.hurt = 1</script><img src=x onerror=window.hurt=1>"


FIRST = 3  # parts of an answer that come before the gate


BOTH = f'talk/["{MODEL}","runs/first"]'


PAGES = {
    "new": "document.querySelector('.row mark') && document.querySelector('.sheet dl.tiles')",
    "runs/first,second": "document.querySelector('.panel table')",
    "run/first": "document.querySelector('.plot canvas') && document.querySelector('.pair .bubble')",
    BOTH: (
        "document.querySelectorAll('.turn.assistant').length > 1 &&"
        " !document.querySelector('.turns[aria-busy]')"
    ),
}


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


class Paced(Here):
    """A model of which the test says how fast it is: after a few parts, an answer waits at the gate."""

    # models of two dtypes cannot be loaded at once in one process
    gate, loading = threading.Event(), threading.Lock()
    gate.set()
    ended: list[tuple[int, bool]] = []  # parts and whether it was stopped, of each answer

    def ask(self, task: str, on_part: Callable[[str], bool] | None = None, **arguments: Any) -> Any:
        if on_part is None:
            return super().ask(task, **arguments)
        parts = 0
        self.loading.acquire()

        def paced(part: str) -> bool:
            nonlocal parts
            parts += 1
            if parts == 1:
                self.loading.release()
            assert parts <= FIRST or self.gate.wait(60)
            return on_part(part)

        try:
            said = super().ask(task, paced, **arguments)
        finally:
            if not parts:
                self.loading.release()
        self.ended.append((parts, said["stopped"]))
        return said


class Watched(server.AnswerStream):
    """Tells when nobody listens any more."""

    made: list[threading.Event] = []

    def __init__(self, lines: Any, gone: threading.Event):
        super().__init__(lines, gone)
        self.made.append(gone)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A studio with two runs that are finished, one after the other, on one server for all tests here."""
    import luthier

    server.AnswerStream, aloud = Watched, server.AnswerStream
    home, before = tmp_path_factory.mktemp("desk"), Path.cwd()
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(9) for b in range(9)]
    rows[0] = {"prompt": HOSTILE, "completion": HOSTILE}
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (home / "sums.jsonl").write_text(text + '{"prompt": ""}\n')
    os.chdir(home)
    for name, rate in (("first", 1e-3), ("second", 1e-2)):
        luthier.tune(
            folder=home / "runs" / name,
            model=MODEL,
            data="sums.jsonl",
            dtype="float32",
            max_steps=6,
            eval_steps=2,
            logging_steps=1,
            learning_rate=rate,
            per_device_train_batch_size=4,
            tuner={"name": "lora", "r": 2},
            evaluate=["loss", {"name": "generate", "n": 2, "max_new_tokens": 4}],
        )
    with listening(0) as ear:
        web = uvicorn.Server(
            uvicorn.Config(server.studio(home, TOKEN, Paced), log_level="warning", ws="none")
        )
        thread = threading.Thread(target=web.run, kwargs={"sockets": [ear]})
        thread.start()
        yield SimpleNamespace(home=home, base=f"http://127.0.0.1:{ear.getsockname()[1]}")
        Paced.gate.set()
        web.should_exit = True
        thread.join(20)
    os.chdir(before)
    server.AnswerStream = aloud


@pytest.fixture(scope="module")
def browser(served, tmp_path_factory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    made.go(f"{served.base}/?token={TOKEN}")
    made.see("document.querySelector('h1')?.textContent === 'Runs'")
    assert "token" not in made.run("location.href")
    yield made
    assert made.said == []
    made.end()


@pytest.fixture
def page(browser) -> Iterator[Browser]:
    """The browser as it was: wide, light, on the screen."""
    yield browser
    Paced.gate.set()
    browser.media()
    browser.resize(1200)


def turn(browser: Browser, address: str) -> None:
    """To another page, drawn anew even where it is shown already."""
    browser.run("location.hash = '#run/nothing'")
    browser.see("document.querySelector('h1')?.textContent === 'This page cannot be shown'")
    browser.run(f"location.hash = {json.dumps('#' + address)}")
    browser.see("document.querySelector('h1').textContent !== 'This page cannot be shown'")


def show(browser: Browser, page: str) -> None:
    if page == "new":
        draft = {"model": MODEL, "data": "sums.jsonl", "max_steps": "3"}
        browser.run(f"sessionStorage.setItem('luthier-draft', {json.dumps(json.dumps(draft))})")
    turn(browser, page)
    if page == "new":
        browser.press("Estimate the cost")
    if page.startswith("talk"):
        browser.see("document.querySelector('.turns')")
        if not browser.run("document.querySelector('.turn.assistant')"):
            browser.write("Message", "1+1=")
            browser.press("Ask")
    browser.see(PAGES[page])


def again(browser: Browser) -> None:
    """A reload."""
    browser.run("window.old = true")
    browser.send("Page.reload")
    browser.see("!window.old && document.querySelector('h1')")


def until(browser: Browser, seen: Callable[[], bool]) -> None:
    """What the server does meanwhile is looked at through the page's clock, so that the test waits no longer
    than it must.
    """
    for _ in range(400):
        if seen():
            return
        browser.run("new Promise((then) => setTimeout(then, 25))")
    raise AssertionError("never seen")


NAME = """(() => { const x = document.activeElement, s = getComputedStyle(x);
  const outlined = s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2;
  return [x.labels?.[0]?.textContent ?? x.ariaLabel ?? x.textContent.trim(), outlined, x.tagName]; })()"""


def tab_to(browser: Browser, name: str, most: int = 120) -> None:
    """Tab by Tab to the control of this name; each stop shows where one is."""
    for _ in range(most):
        browser.key("Tab", 9)
        found, seen, tag = browser.run(NAME)
        assert seen or tag == "BODY", f"{tag} {found!r} is reached unseen"
        if found == name:
            return
    raise AssertionError(f"{name} is not reached")


@needs_browser
def test_a_run_by_keyboard_alone(served, page):
    """From an empty page to a trained model that answers, with hostile rows on the way; what is said aloud; a
    reload.
    """
    quick = {"dtype": "float32", "evaluate": "[loss, {name: generate, n: 2, max_new_tokens: 4}]"}
    page.run(f"sessionStorage.setItem('luthier-draft', {json.dumps(json.dumps(quick))})")
    turn(page, "new")
    page.see("document.querySelectorAll('.fields').length > 3")
    page.run(
        "window.aloud = []; const status = document.getElementById('status'); new MutationObserver(() =>"
        " aloud.push(status.textContent)).observe(status, {childList: true});"
        " document.activeElement.blur(); scrollTo(0, 0)"
    )
    tab_to(page, "Skip to the page")
    page.key("Enter", 13)
    assert page.run("document.activeElement.id") == "main" and page.run("location.hash") == "#new"
    for field, text in (("Model", MODEL), ("Data", "sums.jsonl"), ("max_steps", "4"), ("eval_steps", "2")):
        tab_to(page, field)
        page.type(text)
    page.see("document.querySelector('.row mark')")
    assert page.run("getComputedStyle(document.querySelector('.row mark')).textDecorationLine") == "underline"
    assert page.run("document.querySelector('.row mark').textContent").startswith("<script>")
    assert page.run("document.querySelectorAll('.row img, .row script').length + (window.hurt ?? 0)") == 0
    page.see("document.querySelector('details.aside')?.textContent.includes('sums.jsonl:82')")
    page.see(
        "document.querySelector('pre.recipe').textContent.includes('eval_steps: 2') &&"
        " !document.querySelector('button.main').disabled"
    )
    tab_to(page, "Name of the run")
    page.run("document.activeElement.select()")
    page.type("hand")
    assert page.run(
        "document.querySelector('.sheet').textContent.includes('luthier tune runs/hand/submitted.yaml"
        " output_dir=runs/hand')"
    )
    tab_to(page, "Start the run")
    page.key("Enter", 13)
    page.see("document.querySelector('h1').textContent === 'hand' && document.activeElement.tagName === 'H1'")
    page.see("document.querySelector('.badge.finished, .badge.failed')", 120)
    page.see("document.querySelector('.plot canvas') && document.querySelector('.pair .bubble')")
    aloud = page.run("aloud")
    for words in ("81 rows read, 1 unusable", "the recipe can run", "run hand started", "hand is finished"):
        assert words in aloud, aloud
    again(page)
    page.see("document.querySelector('.badge.finished') && document.querySelector('.plot canvas')")
    tab_to(page, "Export")
    page.key("Enter", 13)
    page.see("document.activeElement.tagName === 'SELECT'")
    tab_to(page, "Export")
    page.key("Enter", 13)
    page.see("document.querySelector('p.good')?.textContent.includes('outputs match the tuned model')")
    assert (served.home / "exports/hand-lora/adapter_model.safetensors").is_file()
    tab_to(page, "Close")
    page.key("Enter", 13)
    page.see("!document.querySelector('dialog') && document.activeElement.textContent === 'Export'")
    tab_to(page, "Chat with it")
    page.key("Enter", 13)
    page.see("document.activeElement.textContent === 'Chat'")
    tab_to(page, "Message")
    page.type("1+1=")
    page.key("Enter", 13)
    page.see(
        "document.querySelectorAll('.turn.assistant').length === 2 &&"
        " !document.querySelector('.turns[aria-busy]')"
    )
    page.run("sessionStorage.clear()")


CONTRAST = r"""(() => {
  const rgba = (c) => { const n = c.match(/[\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, low) => low.map((x, i) => top[i] * top[3] + x * (1 - top[3]));
  const linear = (x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = (c) => { const [r, g, b] = c.map(linear); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const ground = (e) => {
    const all = [];
    for (; e; e = e.parentElement) {
      all.unshift(rgba(getComputedStyle(e).backgroundColor));
      if (all[0][3] === 1) break;
    }
    return all.reduce((low, top) => over(top, low), [255, 255, 255]);
  };
  const opacity = (e) => {
    let o = 1;
    for (; e; e = e.parentElement) o *= Number(getComputedStyle(e).opacity);
    return o;
  };
  const low = []; let seen = 0;
  const check = (what, element, colour, least) => {
    const below = ground(element), c = rgba(colour); c[3] *= opacity(element);
    seen++;
    const found = ratio(over(c, below), below);
    const rounded = Math.round(found * 100) / 100;
    if (found < least) low.push([what.trim().slice(0, 40), colour, below.map(Math.round).join(), rounded]);
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walk.nextNode();) {
    const e = node.parentElement;
    const visible = e.checkVisibility({ visibilityProperty: true });
    const exempt = e.closest(':disabled, option, noscript, .hidden, .skip');
    if (node.data.trim() && visible && !exempt) check(node.data, e, getComputedStyle(e).color, 4.5);
  }
  const inputs = document.querySelectorAll('input:not([type=checkbox], [type=file]), select, textarea');
  for (const e of inputs) if (e.checkVisibility()) {
    check(e.value || 'empty', e, getComputedStyle(e).color, 4.5);
    if (e.placeholder) check(e.placeholder, e, getComputedStyle(e, '::placeholder').color, 4.5);
    check('border', e.parentElement, getComputedStyle(e).borderTopColor, 3);
  }
  for (const e of document.querySelectorAll('.u-series + .u-series .u-marker')) {
    const name = e.parentElement.textContent;
    if (name === 'each step') continue; // the smoothed curve's shadow
    check(`curve ${name}`, e.closest('.plot'), getComputedStyle(e).borderBottomColor, 3);
  }
  return { low, seen };
})()"""


@needs_browser
@pytest.mark.parametrize("address", PAGES, ids=lambda a: a.split("/")[0])
def test_words_stand_out_on_screen_and_paper_and_fit_a_phone(served, page, address):
    """4.5:1 for text and 3:1 for curves and edges, light, dark and printed; no sideways scroll; nothing cut
    off on paper.
    """
    show(page, address)
    wide = (
        "[...document.querySelectorAll('body *')].filter(x => x.getBoundingClientRect().right >"
        " document.documentElement.clientWidth + 1 && !x.closest('.wide')).map(x =>"
        " `${x.tagName}.${x.className} ${x.textContent.slice(0, 30)}`)"
    )
    for dark in (False, True):
        page.media(dark)
        found = page.run(CONTRAST)
        assert found["low"] == [] and found["seen"] > 25, ("dark" if dark else "light", found)
    for width in (380, 320):
        page.resize(width)
        page.see(f"{wide}.length === 0 && document.documentElement.scrollWidth <= {width}", 5)
    small = (
        "[...document.querySelectorAll('button, a.button, nav a, select, input')].filter(x =>"
        " x.checkVisibility() && !x.closest('.hidden, .skip') && x.type !== 'file').map(x => [x.textContent"
        " || x.id, x.getBoundingClientRect().height]).filter(([, h]) => h < 20)"
    )
    assert page.run(small) == []
    page.resize(800)
    page.media(True, "print")
    assert (
        page.run(
            "[...document.querySelectorAll('.top, .buttons, .asking, .work, .tools')].filter(x =>"
            " x.checkVisibility()).length"
        )
        == 0
    )
    found = page.run(CONTRAST)
    assert found["low"] == [], found
    cut = (
        "[...document.querySelectorAll('main *')].filter(x => x.checkVisibility() &&"
        " /auto|scroll|hidden/.test(getComputedStyle(x).overflowY) && !x.matches('.hidden, textarea, input,"
        " progress, .wide, svg') && x.scrollHeight > x.clientHeight + 1).map(x => x.className || x.tagName)"
    )
    assert page.run(cut) == []
    assert base64.b64decode(page.send("Page.printToPDF")["data"])[:5] == b"%PDF-"


CONTROLS = {
    "button",
    "link",
    "textbox",
    "combobox",
    "checkbox",
    "spinbutton",
    "DisclosureTriangle",
    "progressbar",
    "image",
    "log",
    "region",
}


@needs_browser
@pytest.mark.parametrize("address", PAGES, ids=lambda a: a.split("/")[0])
def test_every_page_can_be_read_aloud(served, page, address):
    """What the browser tells a screen reader: landmarks, one heading above all others, a name for each
    control, live regions.
    """
    show(page, address)
    nodes = [n for n in page.send("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    told = [
        (
            n["role"]["value"],
            n.get("name", {}).get("value", ""),
            {p["name"]: p["value"].get("value") for p in n["properties"]},
        )
        for n in nodes
    ]
    roles = [role for role, _, _ in told]
    assert roles.count("banner") == roles.count("main") == roles.count("navigation") == 1
    assert [(r, n) for r, n, _ in told if r in CONTROLS and not n.strip()] == []
    names = [
        n for r, n, _ in told if r in ("button", "link", "textbox", "combobox", "checkbox", "spinbutton")
    ]
    assert len(names) > 5
    levels = [p["level"] for r, _, p in told if r == "heading"]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:])), (
        levels
    )
    assert [p.get("live") for r, _, p in told if r == "status"] == ["polite"]
    assert page.run("document.querySelector('nav [aria-current=page]')?.textContent") == {
        "n": "New run",
        "t": "Chat",
    }.get(address[0], "Runs")
    has = {
        "new": [
            ("complementary", "The recipe and its cost"),
            ("button", "Objective: sft. Change"),
            ("combobox", "Data"),
        ],
        "runs/first,second": [
            ("checkbox", "Choose first"),
            ("region", "Curves"),
            ("combobox", "Curve"),
            ("table", "loss, in numbers"),
        ],
        "run/first": [
            ("button", "Clone with changes"),
            ("button", "Export"),
            ("region", "Loss"),
        ],
    }.get(address, [("log", "Conversation, left"), ("log", "Conversation, right"), ("textbox", "Message")])
    assert set(has) <= {(r, n) for r, n, _ in told}
    pictures = [n for r, n, _ in told if r == "image"]
    assert all("at step" in n for n in pictures) and bool(pictures) == (
        "first" in address and "talk" not in address
    )


@needs_browser
def test_a_run_is_cloned_with_changes_and_a_dead_one_says_so(served, page):
    """In two tabs at once: the draft of one is not the other's."""
    dead = served.home / "runs/dead"
    dead.mkdir()
    (dead / "submitted.yaml").write_text("model: <script>window.hurt = 1</script>\ndata: ../../etc/passwd\n")
    (dead / "run.json").write_text('{"finished": false, "steps": 9}')
    (dead / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    (dead / ".lock").write_text("999999999")
    (dead / "console.log").write_text(
        "Traceback (most recent call last):\nValueError: <img src=x onerror=window.hurt=1>\n"
    )
    turn(page, "run/dead")
    page.see(
        "document.querySelector('.badge.failed') &&"
        " document.querySelector('.complaint').textContent.includes('<img src=x')"
    )
    page.see("[...document.querySelectorAll('button')].some(x => x.textContent === 'Resume')")
    with page.tab(served.base):
        page.see("document.querySelector('h1')")
        turn(page, "run/first")
        page.press("Clone with changes")
        page.see(
            "document.querySelector('h1').textContent === 'A new run' && document.querySelector('.row mark')"
        )
        page.write("seed", "7")
        page.see("/^seed: 7$/m.test(document.querySelector('pre.recipe').textContent)")
        text = page.run("document.querySelector('pre.recipe').textContent")
        kept = "learning_rate: 0.001", f"model: {MODEL}", "data: sums.jsonl", "  r: 2"
        assert all(line in text.splitlines() for line in kept) and "output_dir" not in text
        assert page.run("document.querySelectorAll('main .complaint:not([hidden])').length") == 0
    assert page.run("document.querySelector('h1').textContent + (window.hurt ?? '')") == "dead"
    shutil.rmtree(dead)


@needs_browser
def test_curves_of_several_runs_in_one_chart(served, page):
    """Chosen in the list, kept by a reload; a line for each loss and each evaluated loss, a legend, the same
    numbers in a table.
    """
    turn(page, "runs")
    page.see("document.querySelector('[data-run=first]')")
    assert page.run("document.querySelector('.panel').hidden")
    for name, lines in (("first", 2), ("second", 4)):
        page.run(f"document.querySelector('[data-run={name}]').click()")
        page.see(f"document.querySelectorAll('.panel .u-series + .u-series').length === {lines}")
    again(page)
    page.see(
        "document.querySelectorAll('.panel .u-series + .u-series').length === 4 &&"
        " document.querySelector('[data-run=second]').checked"
    )
    legend = page.run(
        "[...document.querySelectorAll('.panel .u-series + .u-series')].map(x =>"
        " [x.querySelector('.u-label').textContent,"
        " getComputedStyle(x.querySelector('.u-marker')).borderBottomColor,"
        " getComputedStyle(x.querySelector('.u-marker')).borderBottomStyle])"
    )
    assert [name for name, _, _ in legend] == [
        "first",
        "first, held-out rows",
        "second",
        "second, held-out rows",
    ]
    assert [style for _, _, style in legend] == ["solid", "dashed"] * 2
    assert legend[0][1] == legend[1][1] != legend[2][1] == legend[3][1]
    logged = [json.loads(x) for x in (served.home / "runs/second/metrics.jsonl").read_text().splitlines()]
    cells = page.run(
        "[...document.querySelectorAll('.panel .wide tbody tr')].map(r =>"
        " [...r.children].map(x => x.textContent))"
    )
    assert [c[:2] for c in cells] == [["first", "6"], ["second", "6"]]
    low = min(logged, key=lambda x: x["loss"])
    assert float(cells[1][4]) == pytest.approx(low["loss"], rel=0.01) and int(cells[1][5]) == low["step"]
    assert float(cells[1][6]) == pytest.approx(
        [x for x in logged if "eval_loss" in x][-1]["eval_loss"], rel=0.01
    )
    page.run(
        "(() => { const x = document.querySelector('.panel select'); x.value = 'learning_rate';"
        " x.dispatchEvent(new Event('change')); })()"
    )
    page.see(
        "document.querySelectorAll('.panel .u-series + .u-series').length === 2 &&"
        " document.querySelector('.panel caption').textContent === 'learning rate, in numbers'"
    )


ROWS = (
    "[...document.querySelectorAll('table.runs tbody tr')].map(x => x.querySelector('a').textContent)"
    ".filter(x => x === 'first' || x === 'second')"
)


@needs_browser
def test_the_table_is_filtered_sorted_and_tagged(served, page):
    """Words, a column's words, a metric's bound; a click on a column's head; tags by the bulk bar."""
    page.run("sessionStorage.removeItem('luthier-runs')")
    turn(page, "runs")
    page.see(f"{ROWS}.length === 2")
    measured = {
        name: json.loads((served.home / f"runs/{name}/report.json").read_text())["after"]["loss"]
        for name in ("first", "second")
    }
    low, high = sorted(measured, key=measured.__getitem__)
    middle = sum(measured.values()) / 2
    filters = {"second": ["second"], "tuner:lora first": ["first"], "state:failed": []}
    filters[f"loss<{middle}"] = [low]
    for text, names in filters.items():
        page.run(
            "(() => { const x = document.querySelector('input[type=search]'); x.value ="
            f" {json.dumps(text)}; x.dispatchEvent(new Event('input')); }})()"
        )
        assert page.run(ROWS) == names, text
    page.run(
        "(() => { const x = document.querySelector('input[type=search]'); x.value = '';"
        " x.dispatchEvent(new Event('input')); })()"
    )
    for order in ([high, low], [low, high]):
        page.run("document.querySelector('[data-sort=\"metric:loss\"]').click()")
        assert page.run(ROWS) == order
    page.run("document.querySelector('[data-run=first]').click()")
    page.press("Tag")
    page.write("Add", "<b>best</b>")
    page.press("Add")
    page.see("document.querySelector('table.runs .tag') && !document.querySelector('dialog')")
    assert page.run("document.querySelector('table.runs .tag').textContent") == "<b>best</b>"
    (served.home / "runs/first/labels.json").unlink()


@needs_browser
def test_a_tuner_is_found_by_its_use_and_brings_its_own_learning_rate(served, page):
    page.run(f"sessionStorage.setItem('luthier-draft', {json.dumps(json.dumps({'model': MODEL}))})")
    turn(page, "new")
    page.see("document.querySelector('[data-key=learning_rate] input')?.placeholder === '0.0002'")
    page.run("document.querySelector('button.chosen').click()")
    page.see("document.querySelectorAll('dialog .option').length > 30")
    page.run(
        "(() => { const x = document.querySelector('dialog input'); x.value = 'ia3';"
        " x.dispatchEvent(new Event('input')); })()"
    )
    page.key("Enter", 13)
    page.see("document.querySelector('[data-key=learning_rate] input')?.placeholder === '0.003'")
    page.see("document.querySelector('.ready.not')?.textContent.includes('the recipe has no `data`')")
    assert page.run("document.querySelector('button.main').disabled")
    page.run("[...document.querySelectorAll('.preset')].find(x => x.textContent.startsWith('DPO')).click()")
    page.see("document.querySelector('pre.recipe').textContent.includes('dpo + 0.1*chosen_sft')")
    assert page.run("document.querySelector('.preset[aria-pressed=true]').textContent").startswith("DPO")
    page.run("sessionStorage.clear()")


@needs_browser
def test_what_differs_between_two_answers(served, page):
    cases = {
        ("the cat sat", "the dog sat"): [
            ["the ", True, True],
            ["cat", True, False],
            ["dog", False, True],
            [" sat", True, True],
        ],
        ("nothing of it", "1 + 1 = 2"): None,
        ("", "a"): None,
    }
    for (before, after), parts in cases.items():
        script = f"import('/web/diff.js').then(m => m.diff({json.dumps(before)}, {json.dumps(after)}))"
        assert page.run(script) == parts


ANSWERS = "[...document.querySelectorAll('.turn.assistant:last-child pre')].map(x => x.textContent)"


def ask(page: Browser, text: str = "Tell me a story") -> None:
    """A question to both, answered as far as the gate."""
    Paced.gate.clear()
    Paced.ended.clear()
    Watched.made.clear()
    page.run("sessionStorage.clear()")
    turn(page, BOTH)
    page.see(
        "document.querySelectorAll('.turns').length === 2 && document.querySelector('.turns').textContent"
        " === ''"
    )
    page.write("Message", text)
    page.press("Ask")
    page.see(
        f"document.querySelectorAll('.turns[aria-busy=true]').length === 2 && {ANSWERS}.every(x => x.length"
        " >= 2)"
    )


def hung_up(page: Browser) -> None:
    """The server knows that nobody listens, and the models stop at the next token."""
    until(page, lambda: all(gone.is_set() for gone in Watched.made))
    Paced.gate.set()
    until(page, lambda: len(Paced.ended) == 2)
    assert all(stopped and parts <= FIRST + 1 for parts, stopped in Paced.ended), Paced.ended


@needs_browser
def test_two_answers_grow_side_by_side(served, page):
    ask(page)
    begun = page.run(ANSWERS)
    assert Paced.ended == [] and begun[0] != begun[1]
    Paced.gate.set()
    page.see(
        "!document.querySelector('.turns[aria-busy]') && document.querySelector('[aria-label^=Conversation]"
        " + p')"
    )
    whole = page.run(ANSWERS)
    assert [stopped for _, stopped in Paced.ended] == [False, False]
    assert all(len(w) > len(b) and w.startswith(b.strip()) for w, b in zip(whole, begun)), (begun, whole)
    assert page.run("document.querySelector('.shell').innerText.split('\\n')") == [
        f"luthier chat {m} --max-new-tokens 256" for m in (MODEL, "runs/first")
    ]
    again(page)
    page.see(f"{ANSWERS}.length === 2")
    assert page.run(ANSWERS) == whole


@needs_browser
@pytest.mark.parametrize("how", ["stop", "leave", "reload"])
def test_an_answer_ends_where_nobody_wants_it(served, page, how):
    """By its button, by going to another page, by a reload: the model is free, and what was heard stays."""
    ask(page)
    heard = page.run(ANSWERS)
    if how == "stop":
        page.press("Stop")
        page.see(
            "document.querySelector('.turns').textContent.includes('stopped here') &&"
            " document.activeElement.tagName === 'TEXTAREA'"
        )
    elif how == "leave":
        page.run("location.hash = '#runs'")
        page.see("document.querySelector('[data-run=first]')")
    else:
        again(page)
    hung_up(page)
    if how == "leave":
        turn(page, BOTH)
    page.see(f"{ANSWERS}.length === 2")
    left = page.run(ANSWERS)  # a word may have come between reading and leaving
    assert len(left) == len(heard)
    assert all(text.startswith(begun) for text, begun in zip(left, heard, strict=True))


@needs_browser
def test_a_closed_tab_leaves_its_models_free(served, page):
    page.run("location.hash = '#runs'")
    with page.tab(served.base):
        page.see("document.querySelector('h1')")
        ask(page)
    hung_up(page)
    ask(page)
    Paced.gate.set()
    page.see("!document.querySelector('.turns[aria-busy]')")
    assert [stopped for _, stopped in Paced.ended] == [False, False]


@pytest.mark.slow
def test_who_hangs_up_ends_the_answer(served):
    """The same without a browser: parts come one by one, and a connection that closes ends what is said."""
    Paced.gate.clear()
    Paced.ended.clear()
    body = {"model": "runs/first", "text": "Tell me a story", "before": [], "max_new_tokens": 60}
    with (
        httpx.Client(
            base_url=served.base, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60
        ) as client,
        client.stream("POST", "/api/say/left", json=body) as answer,
    ):
        lines = answer.iter_lines()
        assert ["part" in json.loads(next(lines)) for _ in range(FIRST)] == [
            True
        ] * FIRST and Paced.ended == []
    assert Watched.made[-1].wait(20)
    Paced.gate.set()
    with httpx.Client(
        base_url=served.base, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60
    ) as client:
        again = client.post("/api/say/left", json=body).text.splitlines()  # waits until the first has ended
    assert (
        Paced.ended[0][1]
        and Paced.ended[0][0] <= FIRST + 1
        and not Paced.ended[1][1]
        and "is" in json.loads(again[-1])
    )
