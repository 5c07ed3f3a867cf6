"""New labelled rows: a model that has learned to write texts of a class (stage `label_prefix`) writes as many
as wanted of each, and they take the place of the rows.

Of a model that was tuned privately nothing is spent by sampling: whatever is computed from it is as private
as it is. The names of the labels are taken to be public, and nothing else of the rows is read.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import text_of
from luthier.methods.stages.curate.label_prefix import prefix
from luthier.methods.stages.synthesize._synthesis import Synthesis
from luthier.registry import stage


@stage(
    example={"n": 1, "max_new_tokens": 4},
    paper="arXiv:2306.01684",
    row="dp-synthetic-text",
    requires=[COMPLETIONS, GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="a model writes texts of a class and a classifier is to be trained on these alone.",
    costs="a sampled text for each new row.",
    covers="sampling by label, as many rows as wanted, at no cost of privacy.",
    omits="MAUVE and other measures of the texts beside a classifier's score on real rows.",
    contract={"gives": "a tiny model may write nothing"},
    tests=["methods/stages/synthesize/test_label_texts.py::test_labels_are_balanced_and_rows_are_not_read"],
)
class LabelTexts(Synthesis):
    """prompt = the text, completion = its label; columns `label`, `provenance`."""

    temperature: Annotated[float, Field(ge=0)] = 1.0  # of the texts
    labels: list[str] = field(default_factory=list)  # to write texts of; empty: those of the rows
    n: Annotated[int, Field(ge=1)] = 100  # texts of each label
    domain: str = ""  # as the stage `label_prefix` had it

    def __call__(self, rows, roles):
        rows = [row for row in rows if row.get("completions")]
        labels = self.labels or sorted({text_of(roles, row["completions"][0]).strip() for row in rows})
        author = self.author(roles)
        form = {"id": "synthetic", "prompt": "" if not rows else rows[0]["prompt"]}
        out = []
        for label in labels:
            keys = [f"{label} {k}" for k in range(self.n)]
            replies = author.ask([prefix(label, self.domain)] * self.n, keys)
            for number, reply in enumerate(replies):
                text = reply.strip()
                if not text:
                    author.reject(label, reply, "is empty")
                    continue
                # plain texts end with a line break, as those of labelled rows do
                prompt = f"{text}\n" if isinstance(form["prompt"], str) else text
                row = author.row(form, f"{label}/{number}", prompt, label, label=label)
                row["provenance"]["sources"] = []
                out.append(row)
        return author.finish(rows, out, "it is private: only texts that were written stay")
