"""report.html: one file that needs no network and no script; light and dark, phone and paper. The answer
comes first.

Whatever comes from rows, models or recipes is escaped, and the page's own policy forbids scripts and
connections.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from luthier.report import MARKS
from luthier.report.chart import chart, smoothed, thinned
from luthier.report.console import cut, visible
from luthier.report.numbers import MetricRow, answers, cost, duration, headline, lines, number

# of a log line; whatever else stands there gets a small chart
OWN = ("step", "loss", "learning_rate", "tokens", "seconds")
FEW = 12  # answers shown
LONG = 20_000  # characters of a recipe shown: rows given in Python stand in it


def page(recipe: Any, report: Any, logged: Sequence[Mapping], folder: Path) -> str:
    """The whole page."""
    folder = Path(folder)
    title = f"{name_of(recipe)}"
    parts = (
        _top(recipe, report, title),
        _figures(report),
        _curves(logged),
        _answers(answers(folder)),
        _rows(folder, report.stats),
        _notes(report.notes),
        _provenance(recipe, report, folder),
    )
    return document(title, "".join(p for p in parts if p))


def document(title: str, body: str, style: str | None = None) -> str:
    """A whole page that forbids scripts and connections."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src'
        " 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)} ·'
        f" luthier</title>\n<style>{style or STYLE}</style></head>\n"
        f"<body><main>\n{body}</main></body></html>\n"
    )


def name_of(recipe: Any) -> str:
    """'toy:lm, lora, sft': what a run is called."""

    def word(x: Any) -> str:
        if isinstance(x, (list, tuple)):
            return " + ".join(map(word, x))
        return str(x.get("name", "")) if isinstance(x, Mapping) else str(x)

    return ", ".join(
        w for w in (str(recipe.model), word(recipe.tuner), word(recipe.objective)) if w and w != "None"
    )


def section(title: str, *inside: str, note: str = "") -> str:
    body = "".join(inside)
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>\n" if body else ""


# ---------------------------------------------------------------------------------------------- the answer


def _top(recipe: Any, report: Any, title: str) -> str:
    stats = report.stats
    tiles = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(much)}</dd></div>" for what, much in cost(stats)
    )
    where = ", ".join(str(stats[k]) for k in ("device", "dtype") if stats.get(k))
    if where:
        tiles += f"<div><dt>on</dt><dd>{escape(where)}</dd></div>"
    return (
        f'<header><p class="what">{escape(title)}</p><h1>{escape(headline(report))}</h1></header>\n<dl'
        f' class="tiles">{tiles}</dl>\n'
    )


def _figures(report: Any) -> str:
    every = lines(report)
    if not every:
        return ""
    skills = [line for line in every if "/" in line.name]  # retention_accuracy/chat
    body = _table([line for line in every if line not in skills])
    if skills:
        body += (
            "<h3>Exact elsewhere, skill by"
            f" skill</h3>{_table([replace(x, label=x.name.partition('/')[2]) for x in skills])}"
        )
    n, on = report.stats.get("held_out_rows"), report.stats.get("measured_on", "")
    note = (
        f"Measured on {n:,} held-out rows"
        if n
        else f"Measured on {on}: nothing was held out"
        if on == "training rows"
        else ""
    )
    return section("Before and after", body, note=note + "." if note else "")


def _table(some: Sequence[MetricRow]) -> str:
    word = {True: ("good", "better"), False: ("bad", "worse"), None: ("", "")}
    rows = "".join(
        f'<tr><th scope="row">{escape(x.label)}</th><td>{escape(x.before)}</td><td>{escape(x.after)}</td>'
        f'<td class="{word[x.better][0]}" title="{word[x.better][1]}">{_points(x.change)}</td></tr>'
        for x in some
    )
    head = (
        '<tr><th scope="col"></th><th scope="col">before</th><th scope="col">after</th><th'
        ' scope="col">change</th></tr>'
    )
    return f'<table class="numbers"><thead>{head}</thead><tbody>{rows}</tbody></table>'


def _points(change: str) -> str:
    """'+3.0 points', the unit apart: a phone leaves it out."""
    value, unit, _ = change.partition(" points")
    return escape(value) + (f"<i>{unit}</i>" if unit else "")


# ---------------------------------------------------------------------------------------------- curves


def _curves(logged: Sequence[Mapping]) -> str:
    raw = series(logged, "loss")
    if not raw:
        return ""
    held, soft = series(logged, "eval_loss"), smoothed(raw)
    plots = "".join(
        _loss(kind, raw, soft, held)
        for kind in ("linear", "log")
        if kind == "linear" or min(y for _, y in raw) > 0
    )
    key = '<p class="key"><span class="raw">each step</span><span class="soft">smoothed</span>' + (
        '<span class="held">held-out</span></p>' if held else "</p>"
    )
    switches = _switch("scale", ("linear", "log")) if plots.count('class="plot') > 1 else ""
    rate = series(logged, "learning_rate")
    small = _small("learning rate", rate) if rate else ""
    for name in extra(logged):
        small += _small(name.replace("_", " "), series(logged, name))
    seconds, tokens = sum(x.get("seconds", 0) for x in logged), sum(x.get("tokens", 0) for x in logged)
    note = f"{len(raw):,} logged steps, {tokens:,} tokens in {duration(seconds)}." if seconds else ""
    body = f'<div class="switched">{switches}{key}{plots}</div><div class="smalls">{small}</div>'
    return section("Training", "<h3>Loss</h3>", body, note=note)


def _loss(kind: str, raw: list, soft: list, held: list) -> str:
    several = [("loss", "raw", thinned(raw)), ("smoothed", "soft", thinned(soft)), ("held-out", "held", held)]
    return (
        '<div class="plot'
        f' {kind}">{chart(several, log=kind == "log", low=None if kind == "log" else 0.0, label="loss by step")}</div>'
    )


def _small(name: str, points: list) -> str:
    drawn = chart([(name, "soft", thinned(points))], label=f"{name} by step")
    return f"<figure><figcaption>{escape(name)}</figcaption>{drawn}</figure>" if drawn else ""


def _switch(name: str, choices: Sequence[str]) -> str:
    """Radio buttons before the plots: the style sheet shows the plot of the one that is chosen, without any
    script.
    """
    return "".join(
        f'<input type="radio" name="{name}" id="{name}-{c}"{" checked" if i == 0 else ""}><label'
        f' for="{name}-{c}">{c}</label>'
        for i, c in enumerate(choices)
    )


def series(logged: Sequence[Mapping], name: str) -> list[tuple[float, float]]:
    """(step, value) wherever a value was logged and is a number."""
    said = ((x["step"], x.get(name)) for x in logged if "step" in x)
    return [(s, float(v)) for s, v in said if isinstance(v, (int, float)) and math.isfinite(v)]


def extra(logged: Sequence[Mapping], most: int = 12) -> list[str]:
    """What else was logged as numbers that change."""
    names = dict.fromkeys(k for x in logged for k in x if k not in OWN and k != "eval_loss")
    return [n for n in names if len({v for _, v in series(logged, n)}) > 1][:most]


# ---------------------------------------------------------------------------------------------- words


def _answers(said: Sequence[dict]) -> str:
    if not said:
        return ""
    judged = [a for a in said if a["score_before"] is not None and a["score_after"] is not None]
    won = sum(a["score_after"] > a["score_before"] for a in judged)
    lost = sum(a["score_after"] < a["score_before"] for a in judged)
    note = f"The first {FEW} of {len(said)} prompts" if len(said) > FEW else f"{len(said)} prompts"
    note += (
        f"; of all, {won} became better, {lost} worse, {len(judged) - won - lost} stayed." if judged else "."
    )
    return section("Answers", "".join(_answer(a) for a in said[:FEW]), note=note)


def _answer(a: dict) -> str:
    cells = []
    for when in ("before", "after"):
        score, text = a[f"score_{when}"], a[when]
        mark = "" if score is None else "good" if score > 0 else "bad"
        judged = "" if score is None else f' <b class="{mark}">{escape(_score(score))}</b>'
        body = _text(text) if text is not None else "<i>not asked</i>"
        cells.append(f'<div class="{when}"><h4>{when}{judged}</h4>{body}</div>')
    if a["expected"] is not None:
        cells.append(f"<div><h4>expected</h4>{_text(a['expected'])}</div>")
    return f'<article><h4>asked</h4>{_text(a["prompt"])}<div class="sides">{"".join(cells)}</div></article>'


def _score(score: float) -> str:
    return {1.0: "right", 0.0: "wrong"}.get(score, number(score))


def _text(text: str) -> str:
    return f"<pre>{escape(visible(cut(str(text), 2000))) or '<i>nothing</i>'}</pre>"


def _rows(folder: Path, stats: Mapping) -> str:
    path = folder / "shown.json"
    shown = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    said = []
    if stats.get("data_rows"):
        said.append(f"{stats['data_rows']:,} rows, {stats.get('row_tokens', 0):,} tokens")
    if stats.get("supervised_share"):
        said.append(f"{100 * stats['supervised_share']:.0f}% of the tokens are learned (marked)")
    if stats.get("longest"):
        said.append(f"the longest row has {stats['longest']:,} tokens")
    if stats.get("cut"):
        said.append(f"{stats['cut']:,} were cut to max_length")
    if stats.get("bad_rows"):
        said.append(f"{stats['bad_rows']:,} were set aside, with reasons, in quarantine.jsonl")
    body = "".join(f"<article><pre>{marked(t)}</pre></article>" for t in shown)
    return section(
        "Data, as the model reads it",
        body or ("<p></p>" if said else ""),
        note="; ".join(said) + "." if said else "",
    )


def marked(text: str) -> str:
    """A rendered row, what is learned in <mark>."""
    safe = escape(visible(cut(text, 4000)))
    opened = safe.count(MARKS[0]) - safe.count(MARKS[1])  # a cut may have taken a mark's other half
    return safe.replace(MARKS[0], "<mark>").replace(MARKS[1], "</mark>") + "</mark>" * max(0, opened)


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(n)}</li>" for n in notes)
    return section("Told on the way", f"<ul>{items}</ul>" if items else "")


# ---------------------------------------------------------------------------------------------- where it came from


def _provenance(recipe: Any, report: Any, folder: Path) -> str:
    made = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(who)}</dd></div>" for what, who in versions())
    text = recipe.yaml()
    text = text if len(text) <= LONG else text[:LONG] + "\n... (the whole recipe: recipe.yaml)"
    again = (
        f"luthier tune {shlex.quote(str(folder / 'recipe.yaml'))}"
        f" output_dir={shlex.quote(str(folder) + '-again')}"
    )
    return section(
        "How to repeat it",
        f"<pre>{escape(again)}</pre>",
        f'<dl class="tiles">{made}<div><dt>fingerprint</dt><dd>{escape(recipe.fingerprint())}</dd></div></dl>',
        f"<details><summary>The whole recipe</summary><pre>{escape(text)}</pre></details>",
    )


@cache
def versions() -> tuple[tuple[str, str], ...]:
    """What computed it."""
    made = [("python", platform.python_version())]
    for name in ("luthier", "torch", "transformers", "peft", "accelerate"):
        try:
            made.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(made)


STYLE = """
:root{--paper:#fdfcfa;--ink:#22201c;--soft:#6d675e;--line:#e4dfd6;--card:#f6f3ee;--wood:#a4501f;--good:#1d7a46;--bad:#b3261e;
--raw:#d9b79f;--held:#2563a8;--mark:#d6eed9}
@media(prefers-color-scheme:dark){:root{--paper:#191714;--ink:#ece7df;--soft:#a39b8f;--line:#38342e;--card:#23201c;--wood:#e59a63;
--good:#6fcf97;--bad:#ff8a80;--raw:#6b4a36;--held:#7db4f0;--mark:#1f4a30}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:56rem;margin:0 auto;padding:1.5rem 1rem 4rem}
header{margin:1rem 0 1.5rem}
.what{margin:0 0 .4rem;color:var(--wood);font-weight:600;overflow-wrap:anywhere}
h1{margin:0;font-size:clamp(1.35rem,4.4vw,2rem);line-height:1.25;font-weight:650;letter-spacing:-.01em;text-wrap:pretty}
h2{margin:0 0 .25rem;font-size:1.2rem}
h3{margin:1.25rem 0 .5rem;font-size:1rem}
h4{margin:0 0 .2rem;font-size:.78rem;font-weight:500;color:var(--soft)}
h4 b{margin-left:.3rem}
section{margin-top:2.5rem;padding-top:1.25rem;border-top:1px solid var(--line)}
.note{margin:0 0 .9rem;color:var(--soft);font-size:.92rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:0}
.tiles div{background:var(--card);border-radius:8px;padding:.55rem .75rem;min-width:0}
dt{color:var(--soft);font-size:.78rem}
dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.4rem .5rem;border-bottom:1px solid var(--line);text-align:right}
th[scope=row]{text-align:left;font-weight:400;padding-left:0;overflow-wrap:anywhere}td i{font-style:normal}
@media(max-width:30rem){td i{display:none}}
thead th{color:var(--soft);font-weight:500;font-size:.82rem}
td:last-child{white-space:nowrap;padding-right:0}
.good{color:var(--good)}.bad{color:var(--bad)}
pre{margin:0;font:.84rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
section>pre,details pre{background:var(--card);border-radius:8px;padding:.7rem .8rem;margin-bottom:.8rem}
details{margin-top:.8rem}summary{cursor:pointer;color:var(--wood);margin-bottom:.5rem}
article{background:var(--card);border-radius:8px;padding:.7rem .8rem;margin-top:.7rem;break-inside:avoid}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:.8rem;margin-top:.6rem;
border-top:1px solid var(--line);padding-top:.6rem}
.before pre{color:var(--soft)}
mark{background:var(--mark);color:inherit;border-radius:3px;box-decoration-break:clone;-webkit-box-decoration-break:clone;
padding:.05em .1em}
.switched>input{position:absolute;opacity:0}
.switched>label{display:inline-block;padding:.15rem .7rem;border:1px solid var(--line);border-radius:99px;font-size:.82rem;
margin-right:.4rem;cursor:pointer;color:var(--soft)}
.switched>input:checked+label{background:var(--wood);border-color:var(--wood);color:var(--paper)}
.switched>input:focus-visible+label{outline:2px solid var(--held);outline-offset:2px}
.plot.log{display:none}#scale-log:checked~.plot.log{display:block}#scale-log:checked~.plot.linear{display:none}
.key{margin:.5rem 0;font-size:.82rem;color:var(--soft)}
.key span{margin-right:1rem}.key span::before{content:"";display:inline-block;width:1.2em;border-top:3px solid;margin-right:.35em;
vertical-align:middle;border-color:var(--wood)}.key .raw::before{border-color:var(--raw)}.key .held::before{border-color:var(--held)}
.chart{position:relative;height:15rem;margin:.4rem .8rem 1.8rem 3.2rem}
.smalls{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr));gap:.8rem}
.smalls .chart{height:7rem}
figure{margin:0;min-width:0}figcaption{font-size:.82rem;color:var(--soft)}
svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
polyline{fill:none;stroke-width:2;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.raw{stroke:var(--raw)}polyline.raw{stroke-width:1}.soft{stroke:var(--wood)}.held{stroke:var(--held)}
.grid{stroke:var(--line);vector-effect:non-scaling-stroke}rect{fill:transparent}rect:hover{fill:var(--ink);fill-opacity:.08}
.chart span{position:absolute;font-size:.72rem;color:var(--soft);font-variant-numeric:tabular-nums;white-space:nowrap}
.chart .y{right:100%;margin-right:.4rem;transform:translateY(-50%)}.chart .x{top:100%;margin-top:.3rem;transform:translateX(-50%)}
@media print{:root{--paper:#fff;--ink:#000;--card:#f4f4f4}body{font-size:11pt}section{break-inside:auto}main{max-width:none;padding:0}
.switched>input,.switched>label{display:none}h2,h3{break-after:avoid}}
"""
