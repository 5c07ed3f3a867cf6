"""Judgements of many kinds in one format, for a general judge (FLAMe): the task and what counts in the
prompt, the verdict first in the completion, and what explains it behind.

Kinds are pairs (which of two responses is better), points (a rating), classes (a label) and open ones (a
critique). A row's `judgement` has its `kind`, the `responses` that are judged, the `verdict` of a person, and
where there are such the `definition` of the task, the `criteria` and an `explanation`; the row's prompt is
what the responses answer. Tuned by `sft`; with stage `capped_mixture` before it large tasks do not crowd out
small ones.
"""

from __future__ import annotations

from typing import Any

from luthier.errors import RecipeError
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.rewards.judges._judge import plain
from luthier.methods.stages._base import Stage, without
from luthier.registry import Column, stage

JUDGEMENT = Column(
    "judgement",
    says="rows with a `judgement` by people (kind, responses, verdict)",
    example=({"kind": "point", "responses": ["fine"], "verdict": "4"},),
)
KINDS = {  # kind -> how many responses it judges
    "pair": 2,
    "point": 1,
    "class": 1,
    "open": 1,
}
LETTERS = "AB"
PARTS = ("Task", "Criteria", "Context", "Response A", "Response B", "Response")


@stage(
    paper="arXiv:2407.10817",
    row="flame-autorater",
    requires=[JUDGEMENT],
    provides=[COMPLETIONS],
    removes=[SCORES, PAIRS],
    use_when="a judge is to be tuned on judgements of several kinds and sources.",
    costs="nothing beside writing the text.",
    covers="four kinds in one format, read back without loss; mixtures with a cap; consistency over orders.",
    omits="weights of tasks by tail patches, the paper's 102 tasks, RewardBench.",
    tests=[
        "methods/stages/curate/test_judgements.py::test_every_kind_is_read_back",
        "methods/stages/curate/test_judgements.py::test_what_is_no_judgement_is_refused",
        "methods/stages/select/test_capped_mixture.py::test_rates_are_those_of_capped_sizes",
    ],
)
class Judgements(Stage):
    """Prompt and completion of each judgement; a pair's verdict is A or B."""

    asks_model = False

    explain: bool = True  # write the explanation behind the verdict, where there is one

    def __call__(self, rows, roles):
        for row in rows:
            rest = without(row, "judgement")
            prompt, verdict = judgement_prompt(row), self.verdict(row["judgement"])
            yield {**rest, "prompt": prompt, "completions": [verdict]}

    def verdict(self, judgement: dict) -> str:
        """The completion: the verdict, and behind a line break what explains it."""
        explanation = str(judgement.get("explanation") or "")
        text = f" {judgement['verdict']}"
        return f"{text}\n{explanation}" if self.explain and explanation else text


def judgement_prompt(row: dict) -> str:
    """What a judge reads. Raises RecipeError where the row is no judgement of its kind."""
    judgement = row["judgement"]
    kind, responses = judgement["kind"], judgement.get("responses") or []
    if kind not in KINDS:
        raise RecipeError(f"row {row['id']}: judgement '{kind}' is none of {', '.join(KINDS)}")
    if len(responses) != KINDS[kind] or not str(judgement.get("verdict", "")).strip():
        raise RecipeError(f"row {row['id']}: a judgement '{kind}' has {KINDS[kind]} responses and a verdict")
    if kind == "pair" and judgement["verdict"] not in list(LETTERS):
        raise RecipeError(f"row {row['id']}: the verdict of a pair is A or B, not {judgement['verdict']!r}")
    parts = {"Task": judgement.get("definition"), "Criteria": judgement.get("criteria")}
    parts["Context"] = plain(row["prompt"])
    if kind == "pair":
        parts |= {"Response A": responses[0], "Response B": responses[1]}
    else:
        parts["Response"] = responses[0]
    text = [f"[{kind}]"]
    for name, value in parts.items():
        if value:
            text.append(f"{name}:\n{value}")
    return "\n\n".join([*text, "Verdict:"])


def swapped(row: dict) -> dict:
    """A pair in the other order, with its verdict."""
    judgement = row["judgement"]
    verdict = LETTERS[1 - LETTERS.index(judgement["verdict"])]
    return {**row, "judgement": {**judgement, "responses": judgement["responses"][::-1], "verdict": verdict}}


def consistency(judge: Any, rows: list[dict]) -> float:
    """The share of pairs on which a judge says the same of both orders. judge: a row -> A or B."""
    same = 0
    for row in rows:
        same += judge(row) != judge(swapped(row))
    return same / len(rows)


def read_judgement(prompt: str, completion: str) -> dict[str, Any]:
    """The columns that a prompt and a completion were made of."""
    head, *blocks = prompt.removesuffix("\n\nVerdict:").split("\n\n")
    parts: dict[str, str] = {}
    name = ""
    for block in blocks:
        title, colon, text = block.partition(":\n")
        if colon and title in PARTS and title not in parts:
            name, parts[title] = title, text
        else:  # a paragraph of what stands before it
            parts[name] += f"\n\n{block}"
    responses = [parts[p] for p in ("Response A", "Response B", "Response") if p in parts]
    verdict, _, explanation = completion.removeprefix(" ").partition("\n")
    judgement: dict[str, Any] = {"kind": head.strip("[]"), "responses": responses, "verdict": verdict}
    for name, title in (("definition", "Task"), ("criteria", "Criteria")):
        if title in parts:
            judgement[name] = parts[title]
    if explanation:
        judgement["explanation"] = explanation
    return {"prompt": parts.get("Context", ""), "judgement": judgement}
