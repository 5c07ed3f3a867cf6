"""Self-correction, split into confidence and critique: does a second look keep what was right and mend
what was wrong?

A question is asked, then the model is asked to look again. With P(a) the share of right first answers and
P(b | .) that of right second ones, confidence CL = sum P(a) P(b|a) / sum P(a), critique CS = sum (1 - P(a))
P(b|not a) / sum (1 - P(a)), and accuracy of the second turn = acc * CL + (1 - acc) * CS. The relative score
rescales it between acc^2 and 2 acc - acc^2 (Yang et al., 2025): above 0.5 the second look helps by more than
answering twice would by chance. Probabilities are shares of samples that a reward finds right. Departs: where
all first samples of a row are right (or wrong), P(b|not a) (or P(b|a)) is not needed and not asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator, keep
from luthier.methods.formats._base import BadRow
from luthier.registry import Metric, build, evaluator

ASK = "Look at the answer again. Is it right? Write the final answer."


@evaluator(
    metrics=[
        Metric("first_accuracy", "accuracy of first answers", unit="%", better="higher"),
        Metric("second_accuracy", "accuracy after a second look", unit="%", better="higher"),
        Metric("confidence_level", "right answers that stay right", unit="%", better="higher"),
        Metric("critique_score", "wrong answers that become right", unit="%", better="higher"),
        Metric("self_correction_score", "self-correction, relative to chance", unit="%", better="higher"),
    ],
    paper="arXiv:2412.19513",
    row="self-correction-decompose",
    requires=[GENERATE],
    use_when="a model is asked to check its own answers, and you ask whether tuning taught it to insist, to"
    " mend, or only to change its mind.",
    costs="`samples` answers to each of `n` prompts, and a second answer to each of them.",
    covers="confidence, critique, the relative score and their identity, by samples.",
    omits="probabilities by option logits; the tuning on rows of two turns (stage `self_correct` trains by"
    " reward).",
    tests=[
        "methods/evaluators/quality/test_self_correction.py::test_the_identity_of_both_accuracies",
        "methods/evaluators/quality/test_self_correction.py::test_the_same_answer_again_is_half",
        "methods/evaluators/quality/test_self_correction.py::test_models_that_insist_and_that_mend",
    ],
)
class SelfCorrection(Evaluator):
    """`first_accuracy`, `second_accuracy`, `confidence_level`, `critique_score` and `self_correction_score`.
    Where no first answer is right (or wrong), what is a share of these is left out.
    """

    reward: Any = "exact_match"  # the reward that scores answers; 0.5 or more is right
    n: Annotated[int, Field(ge=1)] = 48  # prompts that are answered
    samples: Annotated[int, Field(ge=1)] = 4  # first answers of each, each with a second one
    ask: str = ASK  # what stands before the second answer
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    max_new_tokens: Annotated[int, Field(ge=1)] = 64  # tokens per answer

    @property
    def active_requires(self):
        return self.requires | build("reward", self.reward).requires

    def run(self, roles, rows, folder, when):
        judge = build("reward", self.reward)
        rows = [row for row in rows if row["prompt"]][: self.n]
        first = self.answers(roles, rows, self.samples, "first")
        turns, owners = [], []
        for row, texts in zip(rows, first, strict=True):
            for k, text in enumerate(texts):
                turns.append({**row, "id": f"{row['id']}/{k}", "prompt": self.again(row["prompt"], text)})
                owners.append(row)
        second = self.answers(roles, turns, 1, "second")
        outcomes: dict[str, list[tuple[bool, bool]]] = {}
        place = 0
        for row, texts in zip(rows, first, strict=True):
            for text in texts:
                if second[place]:
                    a, b = judge.scores(owners[place], [text, second[place][0]])
                    outcomes.setdefault(str(row["id"]), []).append((a >= 0.5, b >= 0.5))
                place += 1
        if not outcomes:
            return {}
        by_row: dict[str, dict[str, float]] = {"first_accuracy": {}, "second_accuracy": {}}
        for name, pairs in outcomes.items():
            by_row["first_accuracy"][name] = sum(a for a, _ in pairs) / len(pairs)
            by_row["second_accuracy"][name] = sum(b for _, b in pairs) / len(pairs)
        keep(folder, when, **by_row)
        return decompose(list(outcomes.values()))

    def again(self, prompt: Any, answer: str) -> Any:
        """The prompt of the second answer."""
        if isinstance(prompt, str):
            return f"{prompt}{answer}\n{self.ask}\n"
        return [*prompt, {"role": "assistant", "content": answer}, {"role": "user", "content": self.ask}]

    def answers(self, roles: Any, rows: Sequence[dict], n: int, turn: str) -> list[list[str]]:
        """n texts for each row; none for one that has no room for an answer."""
        usable, prompts, seeds = [], [], []
        for place, row in enumerate(rows):
            try:
                prompts.append(roles.renderer.prompt(row))
            except BadRow:
                continue
            usable.append(place)
            seeds.append(roles.clock.derive_seed("self_correction", turn, row["id"], at=0))
        out: list[list[str]] = [[] for _ in rows]
        if not usable:
            return out
        written = roles.policy.generate(
            prompts,
            rows=[rows[place] for place in usable],
            seeds=seeds,
            n=n,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            stop=roles.renderer.stop_ids,
        )
        for place, several in zip(usable, written, strict=True):
            out[place] = [roles.renderer.answer(ids) for ids in several]
        return out


def decompose(outcomes: Sequence[Sequence[tuple[bool, bool]]]) -> dict[str, float]:
    """(first right, second right) of each sample of each question -> the metrics; questions count alike."""
    first = second = steady = mended = 0.0
    for pairs in outcomes:
        first += sum(a for a, _ in pairs) / len(pairs)
        second += sum(b for _, b in pairs) / len(pairs)
        steady += sum(a and b for a, b in pairs) / len(pairs)  # P(a) P(b|a)
        mended += sum(b and not a for a, b in pairs) / len(pairs)
    count = len(outcomes)
    metrics = {"first_accuracy": first / count, "second_accuracy": second / count}
    if first:
        metrics["confidence_level"] = steady / first
    if first < count:
        metrics["critique_score"] = mended / (count - first)
    if 0 < first < count:
        metrics["self_correction_score"] = relative(first / count, second / count)
    return metrics


def relative(first: float, second: float) -> float:
    """Accuracy of the second turn between first^2 (0) and 2 first - first^2 (1)."""
    return (second - first**2) / (2 * first * (1 - first))
