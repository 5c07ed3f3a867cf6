"""EDA: small changes of a text by which classifiers with few rows gain: words exchanged for synonyms,
inserted, swapped, deleted.

Of each row `copies` follow it, each with one of the four operations on `alpha` of the words (at least one),
the label unchanged (Wei and Zou, 2019); the study of augmentation for prefix tuning, P-tuning v2 and LoRA
(2023) takes alpha 0.1. Synonyms come from `synonyms`, {word: [words]}; without any, the two operations that
need none are drawn. Rows of conversations are left as they are.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal

import torch
from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage
from luthier.registry import stage

WORD = re.compile(r"\S+|\s+")
NEED_NONE, NEED_SYNONYMS = ("swap", "delete"), ("replace", "insert")


@stage(
    paper="arXiv:1901.11196",
    row="da-for-pet",
    requires=[COMPLETIONS],
    use_when="labelled texts are few and the label does not hang on a single word.",
    costs="nothing; epochs grow by the copies.",
    covers="EDA with its four operations; tuners and sizes of data are compared by `luthier compare`,"
    " supervised contrast of representations is objective `core_tuning`'s.",
    omits="back-translation and Mixup of pooled states; the paper's contrastive term for prefix tuning and"
    " its analysis of separation.",
    tests=[
        "methods/stages/augment/test_eda.py::test_without_alpha_the_rows_are_unchanged",
        "methods/stages/augment/test_eda.py::test_each_operation_changes_as_many_words",
    ],
)
class EDA(Stage):
    """Each row and its copies; column `augmentation` of a copy names the operation."""

    asks_model = False

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1  # share of the words that an operation changes; 0: none
    copies: Annotated[int, Field(ge=0)] = 4  # of each row
    operations: tuple[Literal["replace", "insert", "swap", "delete"], ...] = (
        "replace",
        "insert",
        "swap",
        "delete",
    )  # which are drawn from
    synonyms: dict[str, list[str]] = field(default_factory=dict)  # word -> words that mean the same

    def __call__(self, rows, roles):
        rows, out = list(rows), []
        answered = [row for row in rows if row.get("completions")]
        self.left(roles, len(rows) - len(answered), len(rows), "they have no completion")
        able = [name for name in self.operations if self.synonyms or name in NEED_NONE]
        for row in answered:
            out.append(row)
            if not isinstance(row["prompt"], str) or not self.alpha or not able:
                continue
            for copy in range(self.copies):
                rng = roles.clock.rng(self.name, row["id"], copy, at=0)
                operation = able[int(torch.randint(len(able), (1,), generator=rng))]
                text = self.changed(row["prompt"], operation, rng)
                if text != row["prompt"]:
                    new = {**row, "id": f"{row['id']}/eda-{copy}", "prompt": text}
                    out.append({**new, "augmentation": operation})
        return out

    def changed(self, text: str, operation: str, rng: torch.Generator) -> str:
        """A text after one operation; spaces and line breaks stay where they were."""
        pieces = WORD.findall(text)
        places = [k for k, piece in enumerate(pieces) if not piece.isspace()]
        count = max(1, round(self.alpha * len(places)))
        if operation in NEED_SYNONYMS:
            places = [k for k in places if self.others(pieces[k])]
        if operation == "delete":
            count = min(count, len(places) - 1)  # a text is never empty
        if operation == "swap" and len(places) < 2:
            return text
        order = torch.randperm(len(places), generator=rng).tolist()
        for k in order[: max(0, count)]:
            place = places[k]
            if operation == "swap":
                other = places[
                    (k + 1 + int(torch.randint(len(places) - 1, (1,), generator=rng))) % len(places)
                ]
                pieces[place], pieces[other] = pieces[other], pieces[place]
                continue
            if operation == "delete":
                pieces[place] = ""
                continue
            choices = self.others(pieces[place])
            word = choices[int(torch.randint(len(choices), (1,), generator=rng))]
            pieces[place] = word if operation == "replace" else f"{pieces[place]} {word}"
        end = re.search(r"\s*$", text)
        body = re.sub(r"[ \t]{2,}", " ", "".join(pieces)).strip()
        return body + (end[0] if end else "")

    def others(self, word: str) -> list[str]:
        return self.synonyms.get(word.lower().strip(".,;:!?"), [])
