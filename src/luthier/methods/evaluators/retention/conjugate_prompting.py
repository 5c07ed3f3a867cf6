"""Conjugate prompting: does tuning erase an ability, or does the model only no longer take a prompt for one
that needs it?

A prompt is transformed so that it looks less like the rows of tuning and still needs the ability; the answer
is transformed back: s^-1(model(s(prompt))) (Kotha et al., 2024). Where the transformed prompt does better
after tuning than the plain one, and did not before, the ability was suppressed and is still there. The same
detour asks whether refusals are avoided by it. Transforms are another language, which a table of words or a
column of the rows brings, and numbers times a factor. Departs: no translator is called; the best transform is
chosen on the rows that are reported, so read single ones where there are many.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import field
from fractions import Fraction
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator, keep
from luthier.methods.evaluators.safety.refusals import OPENINGS, Refusals
from luthier.methods.formats._base import BadRow
from luthier.registry import Artifact, Metric, build, evaluator
from luthier.storage import files

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")
WORD = re.compile(r"\w+")
PLAIN, TRANSLATION = "plain", "words"  # names of arms; the others are named by their factor


@evaluator(
    metrics=[
        Metric("plain_score", "score of plain prompts", unit="%", better="higher"),
        Metric("conjugate_score", "score by the best transform", unit="%", better="higher"),
        Metric("conjugate_gain", "score by the best transform minus plain", unit="%"),
        Metric("plain_refused", "refusals of plain prompts", unit="%"),
        Metric("conjugate_refused", "refusals by the transform with the fewest", unit="%"),
    ],
    artifacts=[Artifact("conjugate-*.jsonl", says="answers to plain and to transformed prompts")],
    paper="arXiv:2309.10105",
    row="conjugate-prompting",
    requires=[GENERATE],
    use_when="an ability, or the habit to decline, seems lost after tuning and you ask whether a detour"
    " still reaches it.",
    costs="one answer to each of `n` prompts, and one more for each transform, before and after.",
    covers="scores and refusals of plain and transformed prompts before and after, by words, by a column of"
    " the rows and by factors of numbers; at toy scale (`luthier.toy.regression`) in-context regression with"
    " its exact predictors, forgetting by tuning on a fixed task and recovery by scaled labels.",
    omits="a translator; the paper's benchmarks and language models; recovery at toy scale where tuning is on"
    " several tasks, which is slight; the probability of a task's kind as the network estimates it.",
    tests=[
        "methods/evaluators/retention/test_conjugate_prompting.py::test_what_is_suppressed_and_what_is_erased",
        "methods/evaluators/retention/test_conjugate_prompting.py::test_transforms_are_taken_back",
        "methods/evaluators/retention/test_conjugate_prompting.py::test_refusals_that_a_detour_avoids",
        "toy/test_regression.py::test_predictors_are_the_posterior_means",
        "toy/test_regression.py::test_scaled_labels_bring_ridge_regression_back",
    ],
)
class ConjugatePrompting(Evaluator):
    """`plain_score`, `conjugate_score/NAME` and, of the best, `conjugate_score` and `conjugate_gain`;
    `plain_refused`, `conjugate_refused/NAME` and, of the lowest, `conjugate_refused`. Names are `words` and
    the factors. Writes conjugate-<when>.jsonl.
    """

    # words of prompts -> words that stand for them, one for one; answers are translated back
    words: dict[str, str] = field(default_factory=dict)
    column: str | None = None  # of rows: the prompt in another language, where `words` alone do not make it
    # factors of all numbers in a prompt; numbers of its answer are divided by it
    factors: tuple[Annotated[float, Field(gt=0)], ...] = (1.5, 2.0, 3.0)
    reward: Any = "exact_match"  # the reward that scores answers
    openings: tuple[str, ...] = OPENINGS  # phrases by which an answer declines, as of `refusals`
    n: Annotated[int, Field(ge=1)] = 48  # prompts
    max_new_tokens: Annotated[int, Field(ge=1)] = 48  # tokens per answer

    def __post_init__(self):
        if len({*self.words.values()}) < len(self.words):
            raise RecipeError("evaluator 'conjugate_prompting': two of `words` have the same translation")
        for word in (*self.words, *self.words.values()):
            if not WORD.fullmatch(word):
                raise RecipeError(f"evaluator 'conjugate_prompting': '{word}' is not one word")
        if not (self.words or self.column or self.factors):
            raise RecipeError("evaluator 'conjugate_prompting' needs words, a column or factors")

    @property
    def active_requires(self):
        return self.requires | build("reward", self.reward).requires

    def run(self, roles, rows, folder, when):
        rows = [row for row in rows if row["prompt"]]
        if self.column is not None:
            rows = [row for row in rows if row.get(self.column)]
        rows = rows[: self.n]
        judge, declines = build("reward", self.reward), Refusals(openings=self.openings).declines
        scores: dict[str, dict[str, float]] = {}
        refused: dict[str, dict[str, float]] = {}
        records = []
        for arm, (there, back) in self.arms().items():
            worded = [{**row, "prompt": there(row)} for row in rows]
            for row, answer in zip(rows, answers(roles, worded, self.max_new_tokens), strict=True):
                if answer is None:
                    continue
                name, restored = str(row["id"]), back(answer)
                scores.setdefault(arm, {})[name] = float(judge.scores(row, [restored])[0])
                refused.setdefault(arm, {})[name] = float(declines(restored))
                records.append({"id": row["id"], "transform": arm, "answer": answer, "restored": restored})
        if PLAIN not in scores or len(scores) < 2:
            return {}
        files.write_rows(folder / f"conjugate-{when}.jsonl", records)
        keep(folder, when, plain_score=scores[PLAIN], plain_refused=refused[PLAIN])
        detours = [arm for arm in scores if arm != PLAIN]
        metrics = {f"conjugate_score/{arm}": fmean(scores[arm].values()) for arm in detours}
        metrics |= {f"conjugate_refused/{arm}": fmean(refused[arm].values()) for arm in detours}
        best = max(metrics[f"conjugate_score/{arm}"] for arm in detours)
        plain = fmean(scores[PLAIN].values())
        return {
            **metrics,
            "plain_score": plain,
            "conjugate_score": best,
            "conjugate_gain": best - plain,
            "plain_refused": fmean(refused[PLAIN].values()),
            "conjugate_refused": min(metrics[f"conjugate_refused/{arm}"] for arm in detours),
        }

    def arms(self) -> dict[str, tuple[Callable[[dict], Any], Callable[[str], str]]]:
        """Name -> (a row's prompt, transformed; an answer, transformed back)."""
        arms: dict[str, Any] = {PLAIN: (lambda row: row["prompt"], str)}
        if self.words or self.column:
            inverse = {theirs: own for own, theirs in self.words.items()}
            arms[TRANSLATION] = (self.translated, lambda answer: replaced(answer, inverse))
        for factor in self.factors:
            arms[f"{factor:g}"] = multiplication(factor)
        return arms

    def translated(self, row: dict) -> Any:
        """A row's prompt in the other language."""
        if self.column is not None:
            return row[self.column]
        return reworded(row["prompt"], lambda text: replaced(text, self.words))


def multiplication(factor: float) -> tuple[Callable[[dict], Any], Callable[[str], str]]:
    """Numbers of a prompt times a factor, and those of an answer divided by it."""
    exact = Fraction(str(factor))

    def there(row: dict) -> Any:
        return reworded(row["prompt"], lambda text: multiplied(text, exact))

    return there, lambda answer: multiplied(answer, 1 / exact)


def reworded(prompt: Any, change: Callable[[str], str]) -> Any:
    """A prompt, or every message of a conversation, changed."""
    if isinstance(prompt, str):
        return change(prompt)
    return [{**message, "content": change(str(message["content"]))} for message in prompt]


def replaced(text: str, words: dict[str, str]) -> str:
    """A text in other words; those that have none stay."""
    return WORD.sub(lambda match: words.get(match[0], match[0]), text)


def multiplied(text: str, factor: Fraction) -> str:
    """A text with all of its numbers times a factor, in up to six places behind the point."""
    if factor == 1:
        return text

    def change(match: re.Match) -> str:
        number = f"{float(Fraction(match[0]) * factor):.6f}"
        return number.rstrip("0").rstrip(".")

    return NUMBER.sub(change, text)


def answers(roles: Any, rows: Sequence[dict], most: int) -> list[str | None]:
    """A greedy answer to each row; None where its prompt is too long for one."""
    usable, prompts = [], []
    for place, row in enumerate(rows):
        try:
            prompts.append(roles.renderer.prompt(row))
        except BadRow:
            continue
        usable.append(place)
    out: list[str | None] = [None] * len(rows)
    if not usable:
        return out
    written = roles.policy.generate(
        prompts,
        rows=[rows[place] for place in usable],
        seeds=[0] * len(usable),
        temperature=0.0,
        max_new_tokens=most,
        stop=roles.renderer.stop_ids,
    )
    for place, (ids,) in zip(usable, written, strict=True):
        out[place] = roles.renderer.answer(ids)
    return out
