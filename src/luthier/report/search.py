"""report.html of a search: the answer first, what was found on both kinds of seeds, every configuration on
maps and in a table, then the comparison of what was found on test seeds. No script and no network.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from luthier.report import comparison
from luthier.report.chart import SIDE, short, ticks
from luthier.report.comparison import label, shown
from luthier.report.console import cut
from luthier.report.numbers import count, duration
from luthier.report.page import STYLE, document, section, versions

MANY = 200  # configurations in the table at most


def page(result: Mapping[str, Any]) -> str:
    """result: what `luthier.search` gives (search.json)."""
    tested = result["comparison"]
    parts = (
        (
            "<header><p"
            f' class="what">{escape(" × ".join(d["name"] for d in result["over"]))}</p><h1>{escape(result["sentence"])}</h1></header>'
        ),
        _tiles(result),
        _found(result),
        _maps(result),
        *(
            make(tested)
            for make in (
                comparison._table,
                comparison._pairs,
                comparison._curves,
                comparison._skills,
                comparison._answers,
            )
            if tested
        ),
        _every(result),
        comparison._notes(tested) if tested else "",
        _provenance(result),
    )
    return document("search", "".join(p for p in parts if p), STYLE + comparison.OWN + OWN)


def _tiles(result: Mapping[str, Any]) -> str:
    sampler = result["sampler"]
    said = {
        "model": result["model"],
        "toward": ", ".join(g["name"] for g in result["goals"]),
        "within": "; ".join(result["limits"]) or "no limit",
        "searcher": sampler["name"],
        "spent": f"{result['spent']:.3g} full runs a seed, {duration(result['took'])}",
        "tuning seeds": ", ".join(map(str, result["seeds"])),
        "test seeds": ", ".join(map(str, result["test_seeds"])),
    }
    return (
        '<dl class="tiles">'
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in said.items())
        + "</dl>\n"
    )


def _found(result: Mapping[str, Any]) -> str:
    """The number it was chosen by, the number on other seeds, and the gap between them."""
    lines = [*([result["start"]] if result.get("start") else []), *result["found"]]
    if not lines:
        return ""
    head = '<th scope="col"></th>' + "".join(
        f'<th scope="col">{escape(g["name"])}<br>{when}</th>'
        for g in result["goals"]
        for when in ("tuning", "test", "gap")
    )
    body = ""
    for one in lines:
        cells = ""
        for g in result["goals"]:
            for when in ("tuning", "test", "gap"):
                value = one[when].get(g["name"])
                low, high = one.get("interval", {}).get(g["name"], (0, 0)) if when == "test" else (0, 0)
                span = f"<i> {escape(_shown(g, low))} to {escape(_shown(g, high))}</i>" if low < high else ""
                cells += f"<td>{'' if value is None else ('+' if when == 'gap' and value > 0 else '') + escape(_shown(g, value)) + span}</td>"
        what = escape(one["said"] or "as it was")
        link = (
            f'<a href="{escape(one["name"])}.yaml">{escape(one["name"])}</a>'
            if one["name"] != "recipe"
            else "the recipe"
        )
        body += f'<tr><th scope="row">{link}<br><small>{what}</small></th>{cells}</tr>'
    rows = (
        "The first is on the held-out rows, the second on test rows."
        if result.get("test_data")
        else "Both are on the same held-out rows."
    )
    note = (
        "Tuning: the mean over the seeds by which it was chosen, which flatters. Test: the mean over seeds"
        f" that no choice has seen. Gap: how much worse the second is. {rows}"
        + " Of fronts: 95 % intervals of the mean over test seeds."
        * any("interval" in x for x in lines)
    )
    return section(
        "What was found",
        '<div class="wide"><table'
        f' class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
        note=note,
    )


def _shown(goal: Mapping[str, Any], value: float) -> str:
    return ("−" if value < 0 else "") + shown(goal["metric"], abs(value))


def _maps(result: Mapping[str, Any]) -> str:
    """A map of the first goal against each other; of one goal, against the order in which configurations
    came.
    """
    first, *others = result["goals"]
    whole = [t for t in result["trials"] if t["share"] >= 1 and not t["failed"]]
    if len(whole) < 2:
        return ""
    if not others:
        drawn = _map(result, whole, first, None)
        figures = (
            f"<figure><figcaption>{escape(label(first['metric']))} (up) in the order of trials"
            f" (across)</figcaption>{drawn}</figure>"
        )
    else:
        figures = "".join(
            f"<figure><figcaption>{escape(label(first['metric']))} (up) by {escape(label(g['metric']))}"
            f" (across)</figcaption>{_map(result, whole, first, g)}</figure>"
            for g in others
        )
    note = (
        "Every configuration measured to its end, means over tuning seeds. Filled: on the front, or the best;"
        " a square: the recipe as it was; grey: outside the limits. Hover tells which, a click opens its run."
    )
    return section("Every configuration", f'<div class="maps">{figures}</div>', note=note)


def _map(result: Mapping[str, Any], whole: Sequence[Mapping], up: Mapping, across: Mapping | None) -> str:
    points = [
        (float(i) if across is None else t["goals"][across["name"]], t["goals"][up["name"]], t)
        for i, t in enumerate(whole)
    ]
    points = [(x, y, t) for x, y, t in points if x is not None and y is not None]
    if not points:
        return ""
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    xmarks, ymarks = ticks(min(xs), max(xs), 3), ticks(min(ys), max(ys), 4)
    place = lambda v, marks: (v - marks[0]) / ((marks[-1] - marks[0]) or 1)
    drawn = ""
    for x, y, t in points:
        kind = "out" if t["over"] > 0 else "on" if t["number"] in result["front"] else "off"
        said = f"{t['said']}: " + ", ".join(
            f"{g['name']} {_shown(g, t['goals'][g['name']])}"
            for g in result["goals"]
            if t["goals"][g["name"]] is not None
        )
        cx, cy = place(x, xmarks) * SIDE, (1 - place(y, ymarks)) * SIDE
        shape = (
            f'<rect class="dot {kind}" x="{cx - 14:.0f}" y="{cy - 18:.0f}" width="28" height="36">'
            if t["kind"] == "recipe"
            else (f'<ellipse class="dot {kind}" cx="{cx:.0f}" cy="{cy:.0f}" rx="12" ry="17">')
        )
        end = "</rect>" if t["kind"] == "recipe" else "</ellipse>"
        inside = f"{shape}<title>{escape(said)}</title>{end}"
        drawn += f'<a href="{escape(_link(result, t))}">{inside}</a>' if t["runs"] else inside
    grid = "".join(
        f'<line class="grid" x1="0" x2="{SIDE}" y1="{(1 - place(y, ymarks)) * SIDE:.0f}"'
        f' y2="{(1 - place(y, ymarks)) * SIDE:.0f}"/>'
        for y in ymarks
    )
    beside = "".join(
        f'<span class="y" style="top:{1 - place(y, ymarks):.2%}">{short(y)}</span>' for y in ymarks
    )
    below = "".join(
        f'<span class="x" style="left:{place(x, xmarks):.2%}">{count(x) if x >= 1000 else short(x)}</span>'
        for x in xmarks
    )
    return (
        f'<div class="chart"><svg viewBox="0 0 {SIDE} {SIDE}"'
        f' preserveAspectRatio="none">{grid}{drawn}</svg>{beside}{below}</div>'
    )


def _link(result: Mapping[str, Any], t: Mapping[str, Any]) -> str:
    return os.path.relpath(Path(t["runs"][0]) / "report.html", result["folder"])


def _every(result: Mapping[str, Any]) -> str:
    """All trials, in their order."""
    head = "".join(
        f'<th scope="col">{escape(x)}</th>'
        for x in ("", "of its steps", *(g["name"] for g in result["goals"]), "seconds")
    )
    body = ""
    for t in result["trials"][:MANY]:
        cells = "".join(
            f"<td>{'' if t['goals'][g['name']] is None else escape(_shown(g, t['goals'][g['name']]))}</td>"
            for g in result["goals"]
        )
        star = " ★" if t["share"] >= 1 and t["number"] in result["front"] else ""
        why = f"<br><small>{escape(cut(t['failed'], 200))}</small>" if t["failed"] else ""
        body += (
            f'<tr><th scope="row">{t["number"]}:'
            f" {escape(t['said'])}{star}{why}</th><td>{t['share']:.0%}</td>{cells}<td>{t['took']:.0f}</td></tr>"
        )
    table = (
        '<div class="wide"><table'
        f' class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    more = len(result["trials"]) - MANY
    note = f"The first {MANY}; {more} more are in search.json." if more > 0 else ""
    return section(
        "All that was tried",
        f"<details><summary>{len(result['trials'])} measurements</summary>{table}</details>",
        note=note,
    )


def _provenance(result: Mapping[str, Any]) -> str:
    made = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(who)}</dd></div>" for what, who in versions())
    recipes = "".join(
        f"<details><summary>{escape(x['name'])}: {escape(x['said'])}</summary><pre>luthier tune"
        f" {escape(shlex.quote(str(Path(result['folder']) / x['name'])))}.yaml</pre></details>"
        for x in result["found"]
    )
    recipes += (
        f"<details><summary>the recipe</summary><pre>{escape(cut(result['recipe'], 20_000))}</pre></details>"
    )
    over = "".join(f"<li>{escape(_dim(d))}</li>" for d in result["over"])
    return section(
        "How to repeat it",
        f"<ul>{over}</ul><dl"
        f' class="tiles">{made}<div><dt>date</dt><dd>{escape(result["date"])}</dd></div></dl>',
        recipes,
    )


def _dim(d: Mapping[str, Any]) -> str:
    where = f" where {d['when'][0]} is {d['when'][1]}" if d.get("when") else ""
    if "choices" in d:
        return f"{d['name']}: {', '.join(map(str, d['choices']))}{where}"
    return f"{d['name']}: {d['low']:g} to {d['high']:g}{', by its logarithm' * d['log']}{where}"


OWN = """
.dot{vector-effect:non-scaling-stroke;stroke-width:1.5;stroke:var(--wood);fill:var(--paper)}.dot.on{fill:var(--wood)}.dot.out{stroke:var(--line);fill:var(--line)}
small{color:var(--soft)}
"""
