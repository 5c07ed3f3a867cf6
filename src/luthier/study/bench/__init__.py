"""How fast luthier is beside what people use: scenarios, each run in turns with TRL + PEFT and a plain loop
on the same work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any


def bench(
    scenarios: Sequence[str],
    shapes: Sequence[str],
    *,
    repeats: int = 5,
    device: str = "cpu",
    only: list[str] | None = None,
    to: Path | None = None,
    tell: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Every scenario on every shape; with `to`, a JSON file and a picture each are written there."""
    from luthier.study.bench.measure import compare

    found = []
    for scenario in scenarios:
        for shape in shapes:
            tell(f"{scenario}, shape {shape}")
            result = compare(scenario, shape, repeats=repeats, device=device, only=only, tell=tell)
            tell(table(result))
            if to is not None:
                to.mkdir(parents=True, exist_ok=True)
                name = f"{scenario}-{shape}" + ("" if device == "cpu" else f"-{device}")
                (to / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                (to / f"{name}.svg").write_text(picture(result), encoding="utf-8")
            found.append(result)
    return found


def table(result: dict[str, Any]) -> str:
    """For the terminal."""
    lines = [
        f"{'':<42} {'seconds':>8} {'spread':>7} {'tokens/s':>9} {'of peak':>8} {'memory':>9} {'ratio':>6}"
    ]
    for name, c in result["contestants"].items():
        share = f"{c['share_of_peak']:.1%}" if "share_of_peak" in c else ""
        ratio = f"{result['ratios'][name]:.1f}x" if name in result["ratios"] else ""
        memory = f"{c['peak_memory_mb']:,.0f} MB" if c["peak_memory_mb"] else ""
        lines.append(
            f"{c['label']:<42} {c['median']:>8.2f} {c['spread']:>7.0%} {c['tokens_per_second']:>9,.0f}"
            f" {share:>8} {memory:>9} {ratio:>6}"
        )
    if result["ratio"]:
        what = "memory" if result["scenario"] == "memory" else "time"
        lines.append(
            f"luthier against the best other: {result['ratio']:.2f}x less {what} ({result['about']})"
        )
    return "\n".join(lines)


def picture(result: dict[str, Any]) -> str:
    """Bars, as an SVG that stands alone."""
    memory = result["scenario"] == "memory"
    values = {
        c["label"]: (c["peak_memory_mb"] if memory else c["median"], c["rival"])
        for c in result["contestants"].values()
    }
    most, rows, y = max((v for v, _ in values.values()), default=1.0) or 1.0, [], 44
    for label, (value, rival) in values.items():
        wide, said = 330 * value / most, f"{value:,.0f} MB" if memory else f"{value:.2f} s"
        rows.append(
            f'<text x="250" y="{y + 13}" text-anchor="end">{escape(label)}</text><rect x="258" y="{y}"'
            f' width="{wide:.1f}" height="18" fill="{"#b8bec9" if rival else "#2f6f4f"}"/><text'
            f' x="{264 + wide:.1f}" y="{y + 13}">{said}</text>'
        )
        y += 28
    title = (
        f"{result['scenario']}, {result['about']}:"
        f" {'peak memory' if memory else 'seconds for the same work'}, median"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 {y + 8}" font-family="system-ui,'
        f' sans-serif" font-size="13" fill="#222"><rect width="680" height="{y + 8}" fill="#fff"/><text'
        f' x="10" y="24" font-weight="600">{escape(title)}</text>{"".join(rows)}</svg>\n'
    )
