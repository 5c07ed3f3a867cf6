"""docs/claims.md, and where each claim stands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.recipe.catalogue import claims_folder
from luthier.storage import files
from luthier.study.reproduce.spec import UNTESTABLE, Claim, Expectation, claim_names, read_claim, sweep_label

Result = dict[str, Any]
LEVEL = 0.95  # of results that name none

HEAD = """\
# Claims

What papers report of methods, reproduced on small models. Written from `benchmarks/claims`;
`luthier reproduce NAME` runs one again. A verdict is about these small models, these tasks and these few
steps, not about the paper: it says what a user may expect to see here. *held*: the whole interval lies beyond
the least effect in the claimed direction. *not held*: the whole interval falls short of it. *undecided*:
neither, or the task leaves no room to tell (all runs alike, a share at its floor or ceiling).

The difference is paired by seed. Each seed draws other rows to train and to evaluate on, the same for all
arms, so that Student's t interval over seeds holds for other rows too; where all seeds are measured on the
same rows (those of other tasks), rows and seeds are crossed random effects, and the interval is that of a
two-way analysis of variance. A claim is looked at twice at most: after a pilot of 8 seeds, and, where these
leave it undecided, after as many seeds as their spread asks for (20 at most). Each look has intervals at
97.5 %, so that both together are wrong no more often than one at 95 %. Several expectations are not corrected
for being several. Where learning rates (or another setting) were swept, a run with a seed that is not
reported picked one for each arm; a sweep of learning rates whose best lies at its edge goes on beyond it.
Results of fewer than 8 seeds are of before these rules: one look at 95 %, without crossed rows. Results of 8
seeds that are undecided were given no second look.

| claim | verdict | expected | difference (interval) | seeds | paper |
| - | - | - | - | - | - |"""


def read_result(name: str, folder: Path | None = None) -> Result | None:
    """What was measured; None where nothing was."""
    path = (folder or claims_folder()) / "results" / f"{name}.json"
    if not path.is_file():
        return None
    return files.read_object(path)


def status(claim: Claim, folder: Path | None = None) -> str:
    """The verdict, or why there is none."""
    if claim.untestable:
        return UNTESTABLE
    result = read_result(claim.name, folder)
    if result is None:
        return "not run yet"
    former = result.get("mark")  # as version 0.1 called it
    if result.get("fingerprint", former) != claim.fingerprint():
        return "not run since it was changed"
    return result["verdict"]


def listing(folder: Path | None = None) -> list[dict[str, Any]]:
    """Every claim with its verdict."""
    rows = []
    for name in claim_names(folder):
        claim = read_claim(name, folder)
        verdict = status(claim, folder)
        rows.append({"name": name, "verdict": verdict, "paper": claim.paper, "claim": claim.claim})
    return rows


def page(folder: Path | None = None) -> str:
    """docs/claims.md: a table of all claims, then a section for each."""
    table = [HEAD]
    sections = []
    for name in claim_names(folder):
        claim = read_claim(name, folder)
        verdict = status(claim, folder)
        result = read_result(name, folder)
        if result and result["verdict"] != verdict:  # of an earlier version of the file
            result = None
        table += _table(claim, verdict, result)
        sections += ["", f"## {name}", "", *_section(claim, verdict, result)]
    return "\n".join([*table, *sections])


def _table(claim: Claim, verdict: str, result: Result | None) -> Iterator[str]:
    """A claim's lines of the table, one an expectation."""
    paper = claim.paper or ""
    if paper.startswith("arXiv:"):
        paper = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
    first = f"[{claim.name}](#{claim.name}) | **{verdict}**"
    if not result or "expectations" not in result:
        expected = "; ".join(map(_expected, claim.expectations))
        yield f"| {first} | {expected} | | | {paper} |"
        return
    seeds = str(len(result["seeds"]))
    for expectation, judged in zip(claim.expectations, result["expectations"]):
        low, high = judged["interval"]
        difference = f"{judged['difference']:+.3g} ({low:+.3g} to {high:+.3g})"
        if len(claim.expect) > 1:
            difference = f"{judged['verdict']}: {difference}"
        yield f"| {first} | {_expected(expectation)} | {difference} | {seeds} | {paper} |"
        first, seeds, paper = "|", "", ""


def _expected(expectation: Expectation) -> str:
    word = "within" if expectation.sign == "=" else "by"
    arms = f"{expectation.left} {expectation.sign} {expectation.right}"
    text = f"{arms} {word} {expectation.effect:g} in `{expectation.metric}`"
    return text.replace("<", "&lt;")


def _section(claim: Claim, verdict: str, result: Result | None) -> Iterator[str]:
    yield f"{claim.claim.strip()} {claim.budget.strip()}".strip()
    yield ""
    if claim.untestable:
        yield f"Not testable here: {claim.untestable}"
        return
    if not result:
        yield f"{verdict[:1].upper()}{verdict[1:]}: `luthier reproduce {claim.name}`."
        return
    for judged in result["expectations"]:
        yield _judged(judged)
    if result.get("power"):
        yield ""
        yield _power(result)
    if result["sweeps"]:
        yield ""
        yield _sweeps(claim, result)
    if claim.attempts:
        yield ""
        yield claim.attempts.strip()
    yield ""
    machine = result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    yield (
        f"{result['date']}, {result['seconds']} s, {machine['cpu']}, {machine['cores']} cores, threads"
        f" {machine['threads']}, {machine['dtype']}; {versions}."
    )


def _judged(judged: Result) -> str:
    """One expectation with its arms' numbers by seed."""
    arms = []
    for name, values in judged.items():
        if isinstance(values, list) and name not in ("interval", "bootstrap"):
            arms.append(f"{name} {' '.join(f'{value:.4g}' for value in values)}")
    low, high = judged["bootstrap"]
    verdict = judged["verdict"].capitalize()
    if "no_room" in judged:
        verdict += f": {judged['no_room']}"
    over = "seeds"
    if "rows" in judged:
        over = f"seeds and {judged['rows']} rows"
    level = 100 * judged.get("level", LEVEL)
    return (
        f"- `{judged['metric']}` by seed: {', '.join(arms)}. {verdict}. Interval at {level:g} %; bootstrap"
        f" at {100 * LEVEL:g} % over {over}, too narrow with few: {low:+.3g} to {high:+.3g}."
    )


def _power(result: Result) -> str:
    """How the number of seeds came about."""
    seeds, power = len(result["seeds"]), result["power"]
    if seeds > power["pilot"]:
        text = f"A pilot of {power['pilot']} seeds left it undecided; by their spread"
        text += f" {power['needed']} seeds tell it, and {seeds} were run."
        return text
    text = f"{seeds} seeds."
    if "needed" in power:
        text += f" By their spread {power['needed']} tell it."
    return text


def _sweeps(claim: Claim, result: Result) -> str:
    """Which value of what was swept each arm took, and of which."""
    arms = []
    for arm, measured in result["sweeps"].items():
        text = f"{arm} {result['learning_rates'][arm]:g} of {', '.join(measured)}"
        if arm in result["at_edge"]:
            text += " (at the edge of its sweep)"
        arms.append(text)
    label = sweep_label(claim.sweep).capitalize()
    return f"{label}s, by the {result['select']} of seed {result['tuning_seed']}: {'; '.join(arms)}."
