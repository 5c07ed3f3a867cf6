"""Turns classification into questions: each label, described in words, becomes a question that is answered
yes or no.

A model that is tuned this way on many tasks can answer questions about labels it has not seen.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage, without
from luthier.registry import stage


@stage(
    example={"questions": {"no": ["is it not?"]}},
    paper="arXiv:2104.04670",
    row="meta-tuning",
    requires=[COMPLETIONS],
    use_when="you have classification sets with label names and want a model that answers questions"
    " about labels it has not seen.",
    costs="one row for each label and each of its questions.",
    covers="questions about every label, groups of tasks held out whole, and the area under the curve for"
    " each.",
    omits="the paper's 43 data sets.",
    tests=[
        "methods/stages/curate/test_yes_no.py::test_yes_no_asks_about_every_label",
        "methods/evaluators/quality/test_yes_no_auc.py::test_auc_is_the_share_of_pairs_in_order",
        "methods/evaluators/quality/test_yes_no_auc.py"
        "::test_meta_tuning_answers_questions_it_was_not_tuned_on",
    ],
)
class YesNo(Stage):
    """One row for each label and each of its descriptions: the question, a line break, the text; yes or no.
    Columns `task`, `question` and `asked` (the label) are added. Labels are the class names, as in the
    completion.
    """

    asks_model = False

    # descriptions of each label as questions, e.g. {positive: ["Is the review positive?"]}
    questions: dict[str, list[str]]
    task: str = ""  # name of the data set, or of a group of similar ones
    # equal numbers of yes and no: surplus rows of the more frequent answer are left out, evenly
    balance: bool = False
    # maximum rows; if there are fewer, they are repeated; 0: no limit and no repetition
    cap: Annotated[int, Field(ge=0)] = 0
    answers: tuple[str, str] = ("yes", "no")  # the two possible completions

    def __call__(self, rows, roles):
        out = []
        for row in rows:
            for label, described in self.questions.items():
                for q, question in enumerate(described):
                    answer = (
                        self.answers[0] if str(row["completions"][0]).strip() == label else self.answers[1]
                    )
                    beside = {"task": self.task, "question": question, "asked": label}
                    text = f"{question}\n{row['prompt'].rstrip()}\n"
                    out.append(
                        {
                            **without(row),
                            **beside,
                            "id": f"{row['id']}/{label}/{q}",
                            "prompt": text,
                            "completions": [answer],
                        }
                    )
        if self.balance:
            sides = [[r for r in out if r["completions"][0] == a] for a in self.answers]
            n = min(map(len, sides))
            out = [r for pair in zip(*(spread(side, n) for side in sides), strict=True) for r in pair]
            self.warn(roles, f"{n} rows of yes and as many of no")
        return spread(out, self.cap) if self.cap else out


def spread(rows: list[dict], n: int) -> list[dict]:
    """n of the rows, evenly from all of them; repeated, with ids of their own, where there are fewer."""
    if not rows:
        return []
    if n <= len(rows):
        return [rows[k * len(rows) // n] for k in range(n)]
    return [
        (
            rows[k % len(rows)]
            if k < len(rows)
            else {**rows[k % len(rows)], "id": f"{rows[k % len(rows)]['id']}~{k // len(rows)}"}
        )
        for k in range(n)
    ]
