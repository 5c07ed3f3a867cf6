"""How fast luthier is beside TRL + PEFT and a plain training loop, on the same work and in turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError


def bench(
    scenarios: Sequence[str],
    shapes: Sequence[str],
    *,
    repeats: int = 5,
    device: str = "cpu",
    only: list[str] | None = None,
    output_dir: Path | None = None,
    tell: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Every scenario on every shape; with `output_dir`, a JSON file and a picture each are written there."""
    from luthier.study.bench.measure import measure

    results = []
    for scenario in scenarios:
        for shape in shapes:
            tell(f"{scenario}, shape {shape}")
            result = measure(scenario, shape, repeats=repeats, device=device, only=only, tell=tell)
            tell(table(result))
            if output_dir is not None:
                write_result(result, output_dir)
            results.append(result)
    return results


def bench_models(
    scenarios: Sequence[str],
    model: str | None,
    data: str | None,
    *,
    minutes: float = 10.0,
    output_dir: Path | None = None,
    tell: Callable[[str], None] = print,
    **how: Any,
) -> list[dict[str, Any]]:
    """Every scenario on a real model and real rows, all of them within `minutes`; with `output_dir`, one JSON
    file is written there: bench.json, of an accelerator with its kind behind. Raises RecipeError.
    """
    from luthier.study.bench import real

    if not (model and data):
        raise RecipeError("bench: --model and --data are needed together")
    results = []
    for scenario in scenarios:
        tell(f"{scenario}, {model}")
        result = real.bench_model(scenario, model, data, minutes=minutes / len(scenarios), tell=tell, **how)
        tell(real.table(result))
        results.append(result)
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        device = results[0]["machine"]["device"]
        name = "bench.json" if device == "cpu" else f"bench-{device}.json"
        (output_dir / name).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def write_result(result: dict[str, Any], folder: Path) -> None:
    """SCENARIO-SHAPE.json and .svg, of an accelerator with its kind behind."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{result['scenario']}-{result['shape']}"
    device = result["machine"]["device"]
    if device != "cpu":
        name += f"-{device}"
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.svg").write_text(picture(result), encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """For the terminal."""
    columns = f"{'seconds':>8} {'spread':>7} {'tokens/s':>9} {'of peak':>8} {'memory':>9} {'ratio':>6}"
    lines = [f"{'':<42} {columns}"]
    for name, measured in result["contestants"].items():
        share = memory = ratio = ""
        if "share_of_peak" in measured:
            share = f"{measured['share_of_peak']:.1%}"
        if measured["peak_memory_mb"]:
            memory = f"{measured['peak_memory_mb']:,.0f} MB"
        if name in result["ratios"]:
            ratio = f"{result['ratios'][name]:.1f}x"
        lines.append(
            f"{measured['label']:<42} {measured['median']:>8.2f} {measured['spread']:>7.0%}"
            f" {measured['tokens_per_second']:>9,.0f} {share:>8} {memory:>9} {ratio:>6}"
        )
    if result["ratio"]:
        what = "memory" if result["scenario"] == "memory" else "time"
        lines.append(
            f"luthier compared with the best other tool: {result['ratio']:.2f}x less {what}"
            f" ({result['about']})"
        )
    return "\n".join(lines)


def picture(result: dict[str, Any]) -> str:
    """Bars, as an SVG that stands alone."""
    key, title, form = "median", "seconds for the same work", "{:.2f} s"
    if result["scenario"] == "memory":
        key, title, form = "peak_memory_mb", "peak memory", "{:,.0f} MB"
    contestants = result["contestants"].values()
    largest = max((measured[key] for measured in contestants), default=0.0) or 1.0
    bars = []
    y = 44
    for measured in contestants:
        width = 330 * measured[key] / largest
        colour = "#b8bec9" if measured["rival"] else "#2f6f4f"
        bars.append(
            f'<text x="250" y="{y + 13}" text-anchor="end">{escape(measured["label"])}</text>'
            f'<rect x="258" y="{y}" width="{width:.1f}" height="18" fill="{colour}"/>'
            f'<text x="{264 + width:.1f}" y="{y + 13}">{form.format(measured[key])}</text>'
        )
        y += 28
    heading = escape(f"{result['scenario']}, {result['about']}: {title}, median")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 {y + 8}" font-family="system-ui,'
        f' sans-serif" font-size="13" fill="#222"><rect width="680" height="{y + 8}" fill="#fff"/><text'
        f' x="10" y="24" font-weight="600">{heading}</text>{"".join(bars)}</svg>\n'
    )
