"""Offers of help: whether an agent speaks where help is needed, and stays silent where it is not.

Each held-out row is a step: its completion is the help that was needed, or the word for silence. The model's
greedy answer makes one of four outcomes: a missed need, a false offer, right silence, right help. Of these:
recall (needs that were met), precision (offers that were needed), false alarms (quiet steps with an offer),
accuracy, and F1. Whether an offer helps is said by `reward`, where one is set (a score of `least` or more);
without one every offer at a step that needs help counts. Where a rate has no cases it is 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator
from luthier.methods.formats._base import COMPLETIONS
from luthier.registry import Metric, build, evaluator


@evaluator(
    metrics=[
        Metric("offer_recall", "needs that were met", unit="%", better="higher"),
        Metric("offer_precision", "offers that were needed", unit="%", better="higher"),
        Metric("false_alarms", "quiet steps with an offer", unit="%", better="lower"),
        Metric("offer_accuracy", "steps that were right", unit="%", better="higher"),
        Metric("offer_f1", "F1 of offers", unit="%", better="higher"),
    ],
    paper="arXiv:2410.12361",
    requires=[COMPLETIONS, GENERATE],
    use_when="an agent has to decide by itself whether to speak.",
    costs="one greedy answer to each held-out row.",
)
class Offers(Evaluator):
    """Rates between 0 and 1 over the held-out rows."""

    silence: str = "none"  # the text that means that nothing is offered; an empty answer means it as well
    max_new_tokens: int = 64  # tokens per answer
    reward: Any = None  # says whether an offer helps, e.g. option_judge; null: any offer does
    least: float = 0.5  # smallest score of an offer that helps

    def run(self, roles, rows, folder, when):
        rows = [row for row in rows if row.get("completions")]
        if not rows:
            return {}
        prompts = [roles.renderer.prompt(row) for row in rows]
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "temperature": 0.0}
        how["seeds"] = [roles.clock.derive_seed("offers", row["id"], at=0) for row in rows]
        written = roles.policy.generate(prompts, rows=rows, stop=roles.renderer.stop_ids, **how)
        judge = build("reward", self.reward) if self.reward else None
        steps = []
        for row, (ids,) in zip(rows, written, strict=True):
            answer = roles.renderer.answer(ids)
            need = self.speaks(str(row["completions"][0]))
            offer = self.speaks(answer)
            helps = offer and (judge is None or judge.scores(row, [answer])[0] >= self.least)
            steps.append((need, offer, helps))
        return rates(steps)

    def speaks(self, text: str) -> bool:
        """Whether a text offers something."""
        return text.strip().casefold() not in ("", self.silence.casefold())


def rates(steps: Iterable[tuple[bool, bool, bool]]) -> dict[str, float]:
    """Of steps (help is needed, something is offered, it helps): the five rates."""
    steps = list(steps)
    right_help = sum(need and helps for need, _, helps in steps)
    right_silence = sum(not need and not offer for need, offer, _ in steps)
    needs, offers = sum(need for need, _, _ in steps), sum(offer for _, offer, _ in steps)
    quiet = len(steps) - needs
    recall, precision = right_help / max(1, needs), right_help / max(1, offers)
    return {
        "offer_recall": recall,
        "offer_precision": precision,
        "false_alarms": (quiet - right_silence) / max(1, quiet),
        "offer_accuracy": (right_help + right_silence) / max(1, len(steps)),
        "offer_f1": 2 * precision * recall / (precision + recall) if right_help else 0.0,
    }
