"""The page of `luthier inspect`: what tuning changed in the weights, what was learned, what was forgotten,
how the answers changed.

No script and no network, like the page of a run. `weights` measures what changed; the numbers and answers are
the evaluators'.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from luthier.methods.evaluators.representation.intruders import effective_rank, likeness, matrices
from luthier.model.anatomy import layer_of
from luthier.report.chart import chart
from luthier.report.numbers import answers, headline, lines, number
from luthier.report.page import STYLE, _answers, _notes, _table, document, section, versions

WIDEST = 2048  # of a matrix whose singular values are still computed: beyond, each takes minutes
FIRST = 10  # singular vectors that are held against the old ones
ALIKE = 0.5  # a cosine below which a direction is new


# ---------------------------------------------------------------------------------------------- what changed


def plain(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Matrices inside the layers under the names that the network itself gives them."""
    return {
        re.sub(r"\.base_layer\b|^base_model\.model\.", "", name): p for name, p in matrices(model).items()
    }


@torch.no_grad()
def weights(before: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, Any]:
    """Each matrix of the tuned network (merged) against the untuned one.

    {matrices: [{name, layer, part, moved, share, rank, new}], spectrum: [..], of: name, unlike: names}.
    moved: the norm of the change by that of the matrix; share: of its numbers that changed; rank: effective
    rank of the change; new: how many of its first singular vectors the old matrix does not have. spectrum:
    singular values of the largest change, the first being 1.
    """
    found, unlike, largest, spectrum, of = [], [], 0.0, [], ""
    for name, now in plain(model).items():
        was = before.get(name)
        if was is None or was.shape != now.shape:
            unlike.append(name)
            continue
        was, now = was.float().cpu(), now.detach().float().cpu()
        change = now - was
        moved = float(change.norm() / was.norm().clamp(min=1e-12))
        place = layer_of(name)
        one = {
            "name": name,
            "layer": place[1] if place else None,
            "part": ".".join(name.split(".")[-3:-1]),
            "moved": moved,
        }
        one["share"] = float((change != 0).float().mean())
        if moved and min(now.shape) <= WIDEST:
            one["rank"] = effective_rank(change)
            one["new"] = sum(x < ALIKE for x in likeness(was, now, FIRST))
            if moved > largest:
                values = torch.linalg.svdvals(change)
                largest, of, spectrum = moved, name, (values / values[0]).tolist()[:64]
        found.append(one)
    return {"matrices": found, "spectrum": spectrum, "of": of, "unlike": unlike}


# ---------------------------------------------------------------------------------------------- the page


def page(found: Mapping[str, Any], folder: Path) -> str:
    """found: what `luthier.inspect` gives. folder: where the evaluators kept answers and calibration."""
    report = SimpleNamespace(
        before=found["base"]["metrics"],
        after=found["tuned"]["metrics"],
        losses=[1],
        stats={"measured_on": found["measured_on"], "steps": 1},
    )
    learned = [x for x in lines(report) if not x.name.startswith("elsewhere")]
    lost = [x for x in lines(report) if x.name.startswith("elsewhere")]
    styled = [x for x in learned if x.name in STYLED]
    declined = [x for x in learned if x.name in DECLINED]
    learned = [x for x in learned if x.name not in (*STYLED, *DECLINED)]
    title = f"{found['base']['model']} → {found['tuned']['model']}"
    parts = (
        f'<header><p class="what">{escape(title)}</p><h1>{escape(headline(report))}</h1></header>',
        section(
            "What it learned",
            _table(learned) if learned else "",
            note=f"On {found['rows']:,} {found['measured_on']}.",
        ),
        section(
            "What it forgot",
            _table(lost) if lost else "",
            note="Elsewhere: rows of what the base could do, or texts that it wrote itself." if lost else "",
        ),
        _changed(found.get("weights")),
        section(
            "How it speaks",
            _table(styled) if styled else "",
            note=(
                "Lengths in tokens; different pairs of neighbouring tokens and different answers to one"
                " prompt, of sampled answers."
                if styled
                else ""
            ),
        ),
        section(
            "What it declines",
            _table(declined) if declined else "",
            note=(
                "Unsafe requests are those whose right answer declines; what an answer does is told by its"
                " first words."
                if declined
                else ""
            ),
        ),
        _calibration(folder),
        _answers(answers(folder)),
        _notes(found["notes"]),
        _made(),
    )
    return document(title, "".join(p for p in parts if p), STYLE)


STYLED = (
    "generated_tokens",
    "distinct_2",
    "distinct_answers",
    "answer_length",
    "length_ratio",
    "length_correlation",
)
DECLINED = ("refused_unsafe", "refused_safe")


def _changed(said: Mapping[str, Any] | None) -> str:
    if not said or not said["matrices"]:
        return ""
    every: Sequence[Mapping[str, Any]] = said["matrices"]
    moved = [m for m in every if m["moved"]]
    note = f"{len(moved)} of {len(every)} matrices inside the layers changed."
    if not moved:
        return section("What changed in the weights", "<p></p>", note=note)
    by_layer, by_part = defaultdict(list), defaultdict(list)
    for m in every:
        by_layer[m["layer"]].append(m["moved"])
        by_part[m["part"]].append(m)
    points = sorted((float(k), 100 * sum(v) / len(v)) for k, v in by_layer.items() if k is not None)
    layers = (
        chart([("change", "soft", points)], low=0.0, label="change by layer, in percent of the weights' norm")
        if len(points) > 1
        else ""
    )
    spectrum = chart(
        [("singular value", "held", [(i + 1.0, v) for i, v in enumerate(said["spectrum"])])],
        low=0.0,
        label="spectrum",
    )
    figures = (
        "<figure><figcaption>size of the change by layer, % of the weights'"
        f" norm</figcaption>{layers}</figure>"
        if layers
        else ""
    )
    if said["spectrum"]:
        figures += (
            f"<figure><figcaption>singular values of the largest change ({escape(said['of'])}), the first"
            f" being 1</figcaption>{spectrum}</figure>"
        )
    head = "".join(
        f'<th scope="col">{x}</th>'
        for x in ("", "change", "numbers moved", "rank of the change", "new directions")
    )
    body = ""
    for part, some in by_part.items():
        ranks, new = [m["rank"] for m in some if "rank" in m], [m["new"] for m in some if "new" in m]
        body += (
            f'<tr><th scope="row">{escape(part)}</th><td>{_mean([100 * m["moved"] for m in some])}%</td>'
            f"<td>{_mean([100 * m['share'] for m in some])}%</td><td>{_mean(ranks)}</td><td>{_mean(new)}</td></tr>"
        )
    note += (
        " Change: its norm by that of the weights. Rank: the effective rank of the change. New directions:"
        f" of the first {FIRST} singular vectors after tuning, how many are unlike every one before (cosine"
        f" below {ALIKE}). Means over matrices."
    )
    if said["unlike"]:
        note += f" {len(said['unlike'])} matrices have no counterpart of the same shape."
    table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return section("What changed in the weights", f'<div class="smalls">{figures}</div>{table}', note=note)


def _mean(values: Sequence[float]) -> str:
    return number(sum(values) / len(values)) if values else ""


def _calibration(folder: Path) -> str:
    figures = ""
    for when in ("before", "after"):
        path = folder / f"calibration-{when}.json"
        if path.is_file():
            points = [(100 * s, 100 * r) for _, s, r in json.loads(path.read_text(encoding="utf-8"))]
            drawn = chart(
                [("right", "soft", points), ("perfect", "raw", [(0, 0), (100, 100)])],
                low=0,
                label=f"calibration {when} tuning",
            )
            figures += f"<figure><figcaption>{when}</figcaption>{drawn}</figure>"
    note = (
        "Across: how sure the model is of a token, in percent; up: how often it is right. On the diagonal it"
        " is as sure as it may be."
    )
    return section(
        "Calibration", f'<div class="smalls">{figures}</div>' if figures else "", note=note if figures else ""
    )


def _made() -> str:
    made = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(who)}</dd></div>" for what, who in versions())
    return section("Made with", f'<dl class="tiles">{made}</dl>')
