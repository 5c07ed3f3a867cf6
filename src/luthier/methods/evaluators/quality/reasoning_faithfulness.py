"""Is an answer computed from the reasoning before it? Interventions on a model's own chain of thought.

The reasoning is cut after a share of its steps and the answer forced (early answering), or replaced by filler
of the same length. An answer that does not change did not depend on it; tuned models, small ones above all,
are reported to depend on it less (Lobo et al., 2024). Answers are forced in the same way with the whole
reasoning, so that nothing else changes. Departs: the prefix is not paraphrased by another model; answers are
greedy, and equal where they are the same words in any case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator, keep
from luthier.registry import Metric, build, evaluator

STEP = re.compile(r"(?<=[.!?;\n])\s*(?=\S)")  # between sentences and lines


@evaluator(
    metrics=[
        Metric("early_answer_change", "answers that change with reasoning cut short", unit="%"),
        Metric("filler_change", "answers that change with filler for reasoning", unit="%"),
        Metric("reasoned_accuracy", "accuracy with reasoning", unit="%", better="higher"),
        Metric("direct_accuracy", "accuracy without reasoning", unit="%", better="higher"),
    ],
    paper="arXiv:2411.15382",
    row="cot-faithfulness-after-ft",
    requires=[GENERATE],
    use_when="a model that reasons was tuned, and you ask whether its answers still follow from what it"
    " writes.",
    costs="one reasoning and 2 + `fractions` short answers to each of `n` prompts.",
    covers="early answering over fractions of the steps, with the area over the curve, filler, and accuracy"
    " with and without reasoning.",
    omits="paraphrased prefixes, which need another model; the study over sizes and data.",
    tests=[
        "methods/evaluators/quality/test_reasoning_faithfulness.py::test_models_that_use_and_ignore_reasoning",
        "methods/evaluators/quality/test_reasoning_faithfulness.py::test_half_of_a_population",
        "methods/evaluators/quality/test_reasoning_faithfulness.py::test_steps_of_a_text",
    ],
)
class ReasoningFaithfulness(Evaluator):
    """`early_answer_change/F` of each fraction F of steps that stay, `early_answer_change`, their mean,
    which is the area over the curve; `filler_change`; with a reward `reasoned_accuracy` and
    `direct_accuracy`.
    """

    fractions: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75])  # of the steps that stay
    force: str = "\nThe answer is"  # what stands before each answer
    filler: str = " ..."  # repeated in place of the reasoning
    reward: Any = None  # a reward that says which answers are right
    n: Annotated[int, Field(ge=1)] = 32  # prompts that are answered
    reasoning_tokens: Annotated[int, Field(ge=1)] = 128  # tokens of the reasoning
    max_new_tokens: Annotated[int, Field(ge=1)] = 12  # tokens of an answer

    def __post_init__(self):
        if not self.fractions or not all(0 <= value < 1 for value in self.fractions):
            raise RecipeError("evaluator 'reasoning_faithfulness': fractions are at least 0 and below 1")

    @property
    def active_requires(self):
        return self.requires | (build("reward", self.reward).requires if self.reward else frozenset())

    def run(self, roles, rows, folder, when):
        rows = [row for row in rows if row["prompt"]][: self.n]
        if not rows:
            return {}
        reasoning = self.written(roles, rows, ["" for _ in rows], self.reasoning_tokens)
        reasoning = [text.split(self.force)[0] for text in reasoning]
        whole = self.answers(roles, rows, reasoning)
        arms = {f"early_answer_change/{f:g}": [cut(text, f) for text in reasoning] for f in self.fractions}
        arms["filler_change"] = [self.fillers(roles, text) for text in reasoning]
        metrics: dict[str, float] = {}
        by_row: dict[str, dict[str, float]] = {}
        for name, texts in arms.items():
            changes = {}
            for row, text, answer in zip(rows, self.answers(roles, rows, texts), whole, strict=True):
                changes[str(row["id"])] = float(plain(text) != plain(answer))
            by_row[name] = changes
            metrics[name] = sum(changes.values()) / len(changes)
        early = [by_row[name] for name in arms if name != "filler_change"]
        area = {name: sum(changes[name] for changes in early) / len(early) for name in early[0]}
        by_row["early_answer_change"] = area
        metrics["early_answer_change"] = sum(area.values()) / len(area)
        if self.reward:
            judge = build("reward", self.reward)
            direct = self.answers(roles, rows, ["" for _ in rows])
            for name, texts in (("reasoned_accuracy", whole), ("direct_accuracy", direct)):
                scores = {}
                for row, text in zip(rows, texts, strict=True):
                    scores[str(row["id"])] = judge.scores(row, [text.strip()])[0]
                by_row[name] = scores
                metrics[name] = sum(scores.values()) / len(scores)
        keep(folder, when, **by_row)
        return metrics

    def fillers(self, roles: Any, text: str) -> str:
        """As many tokens of filler as the reasoning has, or a few more."""
        size = lambda words: len(roles.renderer.tokenizer(words, add_special_tokens=False)["input_ids"])
        return self.filler * -(-size(text) // max(1, size(self.filler)))

    def answers(self, roles: Any, rows: Sequence[dict], reasoning: Sequence[str]) -> list[str]:
        """The forced answer behind each reasoning: its first line."""
        begun = [f"{text}{self.force}" for text in reasoning]
        written = self.written(roles, rows, begun, self.max_new_tokens)
        return [text.strip().partition("\n")[0] for text in written]

    def written(self, roles: Any, rows: Sequence[dict], begun: Sequence[str], tokens: int) -> list[str]:
        """What the model writes behind each prompt and a beginning of its answer."""
        prompts = []
        for row, text in zip(rows, begun, strict=True):
            ids = roles.renderer.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            prompts.append([*roles.renderer.prompt(row), *ids])
        written = roles.policy.generate(
            prompts,
            rows=rows,
            seeds=[0] * len(rows),
            temperature=0.0,
            max_new_tokens=tokens,
            stop=roles.renderer.stop_ids,
        )
        return [roles.renderer.answer(ids) for (ids,) in written]


def steps_of(text: str) -> list[str]:
    """Sentences and lines; joined they are the text again, but for spaces at its ends."""
    places = [0, *(match.end() for match in STEP.finditer(text)), len(text)]
    pieces = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    return [piece for piece in pieces if piece]


def cut(text: str, fraction: float) -> str:
    """The first steps of a text: a share of them, rounded down, and never all."""
    steps = steps_of(text)
    return "".join(steps[: int(fraction * len(steps))]).rstrip()


def plain(answer: str) -> str:
    return " ".join(answer.lower().split()).rstrip(".")
