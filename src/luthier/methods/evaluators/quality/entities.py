"""Named entities in generated lists: precision, recall and F1 of pairs of text and type, all rows together.

An entity is right where its text and its type are both in the reference, as often as there. Counts are
pooled over rows before the ratios are taken, as seqeval's micro F1 does; where no mention occurs twice in
a sentence, pairs are spans. Held-out rows get their prompts by a stage (`prompts`), or stay as they are.
An answer that is no list has no entities. Where a rate has no cases it is 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.formats.labelled.tagged import ENTITIES, entities_in
from luthier.registry import Metric, build, evaluator


@evaluator(
    metrics=[
        Metric("entity_f1", "F1 of entities", unit="%", better="higher", rank=4),
        Metric("entity_precision", "precision of entities", unit="%", better="higher", rank=5),
        Metric("entity_recall", "recall of entities", unit="%", better="higher", rank=5),
        Metric("readable_lists", "answers that are lists", unit="%", better="higher", rank=6),
    ],
    paper="arXiv:2411.00451",
    requires=[COMPLETIONS, GENERATE, ENTITIES],
    use_when="the model lists named entities (rows with `tokens` and `tags`, or stage `entity_prompts`).",
    costs="one greedy answer to each held-out row.",
)
class Entities(Evaluator):
    """Rates between 0 and 1 over all entities of the held-out rows."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # tokens per answer
    prompts: Any = None  # the stage that writes the prompts of held-out rows, e.g. entity_prompts

    def run(self, roles, rows, folder, when):
        rows = [row for row in rows if row.get("entities") is not None]
        if self.prompts is not None:
            rows = list(build("stage", self.prompts)(rows, roles))
        if not rows:
            return {}
        prompts = [roles.renderer.prompt(row) for row in rows]
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "temperature": 0.0}
        how["seeds"] = [roles.clock.derive_seed("entities", row["id"], at=0) for row in rows]
        written = roles.policy.generate(prompts, rows=rows, stop=roles.renderer.stop_ids, **how)
        references, answers, readable = [], [], 0
        for row, (ids,) in zip(rows, written, strict=True):
            entities = entities_in(roles.renderer.answer(ids))
            readable += entities is not None
            references.append(pairs(row["entities"]))
            answers.append(pairs(entities or []))
        return {**pooled_f1(references, answers), "readable_lists": readable / len(rows)}


def pairs(entities: Iterable[dict]) -> list[tuple[str, str]]:
    return [(entity["text"].strip(), entity["type"].strip()) for entity in entities]


def pooled_f1(
    references: Iterable[Iterable[Hashable]], answers: Iterable[Iterable[Hashable]]
) -> dict[str, float]:
    """Of what each row has and what was answered to it (spans, or pairs): the rates over all rows."""
    right = expected = answered = 0
    for reference, answer in zip(references, answers, strict=True):
        ours, theirs = Counter(reference), Counter(answer)
        right += (ours & theirs).total()
        expected += ours.total()
        answered += theirs.total()
    return {
        "entity_f1": 2 * right / max(1, expected + answered),
        "entity_precision": right / max(1, answered),
        "entity_recall": right / max(1, expected),
    }
