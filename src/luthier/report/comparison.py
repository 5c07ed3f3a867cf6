"""report.html of a comparison: the answer first, then every metric with its interval, the front, curves,
answers, recipes.

No script and no network, like the page of a run: what hovers is an SVG title, what is clicked is a link to a
run's own page.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from luthier.report.chart import SIDE, chart, short, thinned, ticks
from luthier.report.console import cut, visible
from luthier.report.numbers import answers, count, number, says
from luthier.report.page import STYLE, document, section, series, versions

COST = {
    "trained": "numbers that move",
    "peak_memory_mb": "peak memory (MB)",
    "seconds": "seconds in steps",
    "tokens_per_second": "tokens/s",
}
COLOURS = 8


def page(result: Mapping[str, Any]) -> str:
    """result: what `luthier.compare` gives (comparison.json)."""
    parts = (
        (
            "<header><p"
            f' class="what">{escape(" / ".join(result["arms"]))}</p><h1>{escape(result["sentence"])}</h1></header>'
        ),
        _tiles(result),
        _table(result),
        _pairs(result),
        _front(result),
        _curves(result),
        _skills(result),
        _calibration(result),
        _answers(result),
        _notes(result),
        _provenance(result),
    )
    return document("comparison", "".join(p for p in parts if p), STYLE + OWN)


def label(metric: str) -> str:
    return COST.get(metric) or says(metric).label


def shown(metric: str, value: float) -> str:
    return count(value) if metric == "trained" else number(value, says(metric).share)


def _tiles(result: Mapping[str, Any]) -> str:
    rows = f"{result['rows']:,} held out" if result.get("rows") else "the training rows"
    said = {
        "model": result["model"],
        "measured on": rows,
        "seeds": str(result["seeds"]),
        "budget": result["budget"] or "as the recipes say",
    }
    return (
        '<dl class="tiles">'
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in said.items())
        + "</dl>\n"
    )


def _table(result: Mapping[str, Any]) -> str:
    """Metric by arm; the best mean is bold only where a difference from some other arm was seen."""
    table, names = result["table"], [n for n in result["arms"] if n not in result["stopped"]]
    if not names:
        return ""
    head = "".join(f'<th scope="col">{escape(n)}{" ★" if n in result["front"] else ""}</th>' for n in names)
    body = ""
    for metric, cells in table.items():
        if "/" in metric:
            continue
        lows = "".join(f"<td>{_cell(metric, cells[n], n in _winners(result, metric))}</td>" for n in names)
        before = result["before"].get(metric)
        body += (
            "<tr><th"
            f' scope="row">{escape(label(metric))}</th><td>{shown(metric, before) if before is not None else ""}</td>{lows}</tr>'
        )
    note = (
        "Means over seeds and rows, with the 95 % bootstrap interval over both. Bold: better than every arm"
        " that is not bold. ★: on the front, beaten by nobody in all of:"
        f" {', '.join(label(g) for g in result['goals'])}."
    )
    first = '<th scope="col"></th><th scope="col">untuned</th>'
    return section(
        "Every metric",
        '<div class="wide"><table'
        f' class="numbers"><thead><tr>{first}{head}</tr></thead><tbody>{body}</tbody></table></div>',
        note=note,
    )


def _cell(metric: str, cell: Mapping[str, Any], best: bool) -> str:
    said = escape(shown(metric, cell["mean"]))
    said = f"<b>{said}</b>" if best else said
    if cell["low"] == cell["high"]:
        return said
    return f"{said}<i> {escape(shown(metric, cell['low']))} to {escape(shown(metric, cell['high']))}</i>"


def _winners(result: Mapping[str, Any], metric: str) -> list[str]:
    """The best arm and those no difference from it was seen of, where it is apart from some arm."""
    pairs, cells, up = result["pairs"].get(metric, ()), result["table"][metric], says(metric).up
    if up is None or not any(p["apart"] for p in pairs):
        return []
    best = (max if up else min)(cells, key=lambda n: cells[n]["mean"])
    behind = {p["b"] if p["a"] == best else p["a"] for p in pairs if best in (p["a"], p["b"]) and p["apart"]}
    return [n for n in cells if n not in behind] if behind else []


def _pairs(result: Mapping[str, Any]) -> str:
    some = [
        m
        for m in dict.fromkeys((result["metric"], "accuracy", "retention_accuracy", "retention_loss"))
        if result["pairs"].get(m)
    ]
    body = "".join(
        f'<tr><th scope="row">{escape(label(m))}: {escape(p["a"])} − {escape(p["b"])}</th>'
        f"<td>{_signed(m, p['difference'])}</td><td>{_signed(m, p['low'])} to"
        f" {_signed(m, p['high'])}</td><td>{p['p']:.2g}</td>"
        f"<td>{'apart' if p['apart'] else 'no difference seen'}</td></tr>"
        for m in some
        for p in result["pairs"][m]
    )
    head = "".join(f'<th scope="col">{x}</th>' for x in ("", "difference", "95 % interval", "p (Holm)", ""))
    note = (
        "Paired by seed and row, both taken as drawn at random. p is corrected for all pairs of one metric:"
        " in all of them together a difference is claimed wrongly in at most 5 % of comparisons."
    )
    return section(
        "Pair by pair",
        (
            '<div class="wide"><table'
            f' class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            if body
            else ""
        ),
        note=note if body else "",
    )


def _signed(metric: str, x: float) -> str:
    if says(metric).share:
        return f"{100 * x:+.1f}"
    return ("+" if x > 0 else "−" if x < 0 else "") + number(abs(x))


# ---------------------------------------------------------------------------------------------- pictures


def _front(result: Mapping[str, Any]) -> str:
    """A small map of the metric against each other goal: an arm is a point, its interval a line; hover tells,
    a click opens its run.
    """
    goals = [g for g in result["goals"] if g != result["metric"]]
    maps = "".join(
        f"<figure><figcaption>{escape(label(result['metric']))} (up) by {escape(label(g))}"
        f" (across)</figcaption>{_map(result, g)}</figure>"
        for g in goals
    )
    return section("What it costs", f'<div class="maps">{maps}</div>{key(result["arms"])}' if maps else "")


def _map(result: Mapping[str, Any], goal: str) -> str:
    across, up = result["table"][goal], result["table"][result["metric"]]
    xs, ys = (
        [c["mean"] for c in across.values()],
        [v for c in up.values() for v in (c["low"], c["high"], c["mean"])],
    )
    drawn = ""
    for i, name in enumerate(result["arms"]):
        if name not in up:
            continue
        x, c = across[name]["mean"], up[name]
        said = (
            f"{name}: {label(result['metric'])} {shown(result['metric'], c['mean'])}, {label(goal)}"
            f" {shown(goal, x)}"
        )
        drawn += spot(
            i, said, _link(result, name), place(xs)(x), *(place(ys, 4)(c[k]) for k in ("mean", "low", "high"))
        )
    return plane(xs, ys, drawn)


def place(values: Sequence[float], about: int = 3) -> Callable[[float], float]:
    """Where a value lies on an axis that shows these values, from 0 to SIDE."""
    marks = ticks(min(values), max(values), about)
    return lambda v: (v - marks[0]) / ((marks[-1] - marks[0]) or 1) * SIDE


def spot(i: int, said: str, link: str | None, x: float, y: float, low: float, high: float) -> str:
    """The i-th point of a map and its interval, counted from below; hover tells, a click opens its run."""
    drawn = (
        f'<line class="c{i % COLOURS}" x1="{x:.0f}" x2="{x:.0f}" y1="{SIDE - low:.0f}"'
        f' y2="{SIDE - high:.0f}"/><ellipse class="c{i % COLOURS}" cx="{x:.0f}" cy="{SIDE - y:.0f}" rx="14"'
        f' ry="20"><title>{escape(said)}</title></ellipse>'
    )
    return f"<a{f' href={chr(34)}{escape(link)}{chr(34)}' if link else ''}>{drawn}</a>"


def plane(xs: Sequence[float], ys: Sequence[float], drawn: str) -> str:
    """A map of what was drawn, with its grid and its labels."""
    xmarks, ymarks, across, up = (
        ticks(min(xs), max(xs), 3),
        ticks(min(ys), max(ys), 4),
        place(xs),
        place(ys, 4),
    )
    grid = "".join(
        f'<line class="grid" x1="0" x2="{SIDE}" y1="{SIDE - up(y):.0f}" y2="{SIDE - up(y):.0f}"/>'
        for y in ymarks
    )
    beside = "".join(f'<span class="y" style="top:{1 - up(y) / SIDE:.2%}">{short(y)}</span>' for y in ymarks)
    below = "".join(
        f'<span class="x" style="left:{across(x) / SIDE:.2%}">{count(x) if x >= 1000 else short(x)}</span>'
        for x in xmarks
    )
    return (
        f'<div class="chart"><svg viewBox="0 0 {SIDE} {SIDE}"'
        f' preserveAspectRatio="none">{grid}{drawn}</svg>{beside}{below}</div>'
    )


def _link(result: Mapping[str, Any], name: str) -> str:
    """A run's page, as seen from the comparison's."""
    return os.path.relpath(Path(result["arms"][name]["runs"][0]) / "report.html", result["folder"])


def key(names: Iterable[str]) -> str:
    return (
        '<p class="key">'
        + "".join(f'<span class="k{i % COLOURS}">{escape(n)}</span>' for i, n in enumerate(names))
        + "</p>"
    )


def _curves(result: Mapping[str, Any]) -> str:
    """Loss of each step, the mean over seeds."""
    several = []
    for i, (_, arm) in enumerate(result["arms"].items()):
        runs = [series(_lines(Path(run) / "metrics.jsonl"), "loss") for run in arm["runs"]]
        by_step: dict[float, list[float]] = {}
        for run in runs:
            for step, value in run:
                by_step.setdefault(step, []).append(value)
        several.append(
            (
                list(result["arms"])[i],
                f"c{i % COLOURS}",
                thinned([(s, sum(v) / len(v)) for s, v in sorted(by_step.items())]),
            )
        )
    drawn = chart(several, label="training loss by step")
    note = "Each arm's own objective, the mean over seeds: only arms of one objective compare."
    return section("Training", drawn, key(result["arms"]), note=note) if drawn else ""


def _lines(path: Path) -> list[dict]:
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        if path.is_file()
        else []
    )


def _skills(result: Mapping[str, Any]) -> str:
    skills = [m for m in result["table"] if m.startswith("retention_accuracy/")]
    names = [n for n in result["arms"] if n not in result["stopped"]]
    head = "".join(f'<th scope="col">{escape(n)}</th>' for n in ("", "untuned", *names))
    body = ""
    for m in skills:
        before = result["before"].get(m)
        cells = "".join(f"<td>{number(result['table'][m][n]['mean'], True)}</td>" for n in names)
        body += (
            "<tr><th"
            f' scope="row">{escape(m.partition("/")[2])}</th><td>{number(before, True)}</td>{cells}</tr>'
        )
    return section(
        "Forgetting, skill by skill",
        (
            '<div class="wide"><table'
            f' class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            if body
            else ""
        ),
    )


def _calibration(result: Mapping[str, Any]) -> str:
    figures = ""
    for i, (name, arm) in enumerate(result["arms"].items()):
        path = Path(arm["runs"][0]) / "calibration-after.json" if arm["runs"] else None
        if path is None or not path.is_file():
            continue
        points = [(100 * s, 100 * r) for _, s, r in json.loads(path.read_text(encoding="utf-8"))]
        drawn = chart(
            [("right", f"c{i % COLOURS}", points), ("perfect", "raw", [(0, 0), (100, 100)])],
            low=0,
            label=f"calibration of {name}",
        )
        figures += f"<figure><figcaption>{escape(name)}</figcaption>{drawn}</figure>"
    note = (
        "Across: how sure the model is of a token, in percent; up: how often it is right. On the diagonal it"
        " is as sure as it may be. First seed."
    )
    return section(
        "Calibration", f'<div class="smalls">{figures}</div>' if figures else "", note=note if figures else ""
    )


def _answers(result: Mapping[str, Any], few: int = 8) -> str:
    said = {
        name: {a["prompt"]: a for a in answers(arm["runs"][0])}
        for name, arm in result["arms"].items()
        if arm["runs"]
    }
    said = {name: some for name, some in said.items() if some}
    if not said:
        return ""
    body = ""
    for prompt, one in list(next(iter(said.values())).items())[:few]:
        cells = ""
        for name, some in said.items():
            a = some.get(prompt, {})
            score = a.get("score_after")
            mark = "" if score is None else ' class="good"' if score > 0 else ' class="bad"'
            cells += f"<div><h4{mark}>{escape(name)}</h4>{_text(a.get('after'))}</div>"
        if one.get("expected") is not None:
            cells += f"<div><h4>expected</h4>{_text(one['expected'])}</div>"
        body += f'<article><h4>asked</h4>{_text(prompt)}<div class="sides">{cells}</div></article>'
    return section("Answers", body, note="The same questions to every arm, first seed.")


def _text(text: str | None) -> str:
    return (
        "<i>not asked</i>"
        if text is None
        else f"<pre>{escape(visible(cut(str(text), 1200))) or '<i>nothing</i>'}</pre>"
    )


# ---------------------------------------------------------------------------------------------- words


def _notes(result: Mapping[str, Any]) -> str:
    said = [*result["notes"], *(f"{name} was stopped: {why}" for name, why in result["stopped"].items())]
    items = "".join(f"<li>{escape(x)}</li>" for x in said)
    return section("What to know", f"<ul>{items}</ul>" if items else "")


def _provenance(result: Mapping[str, Any]) -> str:
    made = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(who)}</dd></div>" for what, who in versions())
    recipes = ""
    for name, arm in result["arms"].items():
        links = " ".join(
            f'<a href="{escape(os.path.relpath(Path(r) / "report.html", result["folder"]))}">seed {i}</a>'
            for i, r in enumerate(arm["runs"])
        )
        again = (
            f"luthier tune {shlex.quote(str(Path(arm['runs'][0]) / 'recipe.yaml'))} output_dir=again"
            if arm["runs"]
            else ""
        )
        recipes += f"<details><summary>{escape(name)}</summary><p>{links}</p><pre>{escape(again)}</pre><pre>{escape(cut(arm['recipe'], 20_000))}</pre></details>"
    return section(
        "How to repeat it",
        f'<dl class="tiles">{made}<div><dt>date</dt><dd>{escape(result["date"])}</dd></div></dl>',
        recipes,
    )


OWN = """
.wide{overflow-x:auto}.wide th[scope=row]{min-width:9.5rem}.numbers td i{display:block;font-style:normal;color:var(--soft);font-size:.75rem;white-space:nowrap}
.maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,16rem),1fr));gap:.8rem}.maps .chart{height:12rem}
a{color:var(--wood)}svg a line{stroke-width:2;vector-effect:non-scaling-stroke}
""" + "".join(
    f".c{i}{{stroke:{c};fill:{c}}}polyline.c{i}{{fill:none}}.key .k{i}::before{{border-color:{c}}}"
    for i, c in enumerate(
        ("#a4501f", "#2563a8", "#1d7a46", "#8e44ad", "#c08a00", "#c2185b", "#00838f", "#757575")
    )
)
