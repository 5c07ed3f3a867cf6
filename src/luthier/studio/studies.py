"""Results of comparisons and searches as the studio's page shows them, in texts and numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.report import comparison, search
from luthier.report.chart import Figure
from luthier.report.numbers import metric_of
from luthier.report.search_result import read_result
from luthier.storage import files

MOST_TRIALS = 200  # configurations in an answer


def comparison_result(path: Path, home: Path) -> dict[str, Any]:
    """Of comparison.json: its arms with their first runs, the table of metrics, the paired differences, maps
    of trade-offs.
    """
    result = files.read_json(path)
    rows = f"{result['rows']:,} held-out rows" if result.get("rows") else "training rows"
    return {
        "kind": "comparison",
        "about": [
            ["model", str(result["model"])],
            ["measured on", rows],
            ["seeds", str(result["seeds"])],
            ["budget of a run", result["budget"] or "as in the recipes"],
        ],
        **tested(result, path.parent, home),
    }


def tested(result: Mapping[str, Any], folder: Path, home: Path) -> dict[str, Any]:
    """Arms, metrics with intervals, paired differences and trade-offs of a comparison."""
    arms = []
    for i, (name, arm) in enumerate(result["arms"].items()):
        stopped = str(result["stopped"].get(name, ""))
        arms.append(
            {
                "name": name,
                "colour": comparison.colour(i),
                "best": name in result["front"],
                "stopped": stopped,
                "runs": [os.path.relpath(home / run, home) for run in arm["runs"]],
            }
        )
    metrics = []
    for row in comparison.metric_table(result):
        metrics.append({**row, "label": metric_of(row["metric"]).label})
    return {
        "arms": arms,
        "finished": comparison.finished_arms(result),
        "metrics": metrics,
        "pairs": comparison.paired_differences(result),
        "maps": [figure(one) for one in comparison.tradeoffs(result)],
        "notes": list(map(str, result["notes"])),
    }


def search_result(path: Path, home: Path) -> dict[str, Any]:
    """Of search.json: every configuration on maps and in a table, what was chosen, and how that compares with
    the recipe on test seeds.
    """
    result = read_result(path)
    trials = [search.trial_row(result, trial) for trial in result["trials"][:MOST_TRIALS]]
    answer = {
        "kind": "search",
        "about": [
            ["model", str(result["model"])],
            ["goals", ", ".join(goal["name"] for goal in result["goals"])],
            ["constraints", "; ".join(result["limits"]) or "none"],
            ["searcher", str(result["sampler"]["name"])],
            ["configurations", str(len(result["trials"]))],
        ],
        "goals": [goal["name"] for goal in result["goals"]],
        "trials": trials,
        "space": [search.describe_dimension(dimension) for dimension in result["space"]],
        "commands": search.commands(result),
        "maps": [figure(one) for one in search.maps(result)],
    }
    if result["comparison"]:
        tests = tested(result["comparison"], path.parent, home)
        answer |= {**tests, "maps": [*answer["maps"], *tests["maps"]]}
    return answer


def figure(one: Figure) -> dict[str, Any]:
    """A map for charts.js. Links lead to pages that lie beside a report, which the studio does not serve."""
    spec = dict(one.spec)
    spec["points"] = [{**point, "link": None} for point in spec["points"]]
    return {"caption": one.caption, "spec": spec}
