"""Pages by jinja2, each whole in one file: style, charts and data stand in it; its policy forbids everything
else.

Whatever comes from rows, models or recipes is escaped by the templates; the one script that may run is ours,
by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from luthier.report.numbers import format_number, metric_of
from luthier.report.text import MARKS, cut, versions, visible

HERE = Path(__file__).parent
STATIC = HERE / "static"  # the studio serves these too
STYLES = ("theme.css", "page.css", "uPlot.min.css", "charts.css")
SCRIPTS = ("uPlot.iife.min.js", "charts.js", "page.js")


def render(template: str, **context: Any) -> str:
    """The text of a template of templates/; names that end with .html.j2 are escaped."""
    return environment().get_template(template).render(**context)


@cache
def environment() -> Environment:
    """The templates, with the filters and constants that all pages use."""
    pages = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "cut": cut,
        "label": lambda name: metric_of(name).label,
        "marked": marked,
        "markdown": markdown,
        "number": format_number,
        "visible": visible,
    }
    pages.globals |= {
        "style": Markup(_texts(STYLES)),
        "script": Markup(script()),
        "policy": POLICY,
        "versions": versions(),
    }
    return pages


def _texts(names: Sequence[str]) -> str:
    """Files of static/ as one text."""
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in names)


def script() -> str:
    """All scripts of a page as one, with the licence of uPlot, which a copy has to carry."""
    licence = (STATIC / "uPlot.LICENSE").read_text(encoding="utf-8")
    return f"/*! uPlot:\n{licence}*/\n{_texts(SCRIPTS)}"


def script_hash() -> str:
    """What a Content-Security-Policy calls the script of a page."""
    digest = hashlib.sha256(script().encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {script_hash()}"


def marked(text: str, limit: int = 4000) -> Markup:
    """A row as the model reads it, supervised tokens in <mark>."""
    safe = str(escape(visible(cut(text, limit))))
    unclosed = safe.count(MARKS[0]) - safe.count(MARKS[1])  # a cut may have taken a mark's other half
    safe = safe.replace(MARKS[0], "<mark>").replace(MARKS[1], "</mark>")
    return Markup(safe + "</mark>" * max(0, unclosed))


def markdown(text: str) -> str:
    """User text in Markdown: no HTML, no table cells of its own."""
    return re.sub(r"([|<>`*_\[\]\\])", r"\\\1", text.replace("\n", " "))
