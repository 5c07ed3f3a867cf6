"""Labelled rows as rows to write texts from: the label in brackets becomes the prompt, the text the
completion.

What a private synthesiser learns from (Kurakin et al., 2023): the prefix names the class, carries no loss,
and is what texts are later sampled from.
"""

from __future__ import annotations

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, text_of, without
from luthier.methods.stages.select._embedding import question
from luthier.registry import stage


@stage(
    paper="arXiv:2306.01684",
    row="dp-synthetic-text",
    requires=[COMPLETIONS],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="a model is to learn to write texts of a class, as plan `private_texts` does.",
    costs="nothing.",
    covers="the prefix of a row, which carries no loss.",
    omits="attention in both directions over the prefix: it is a causal one.",
    tests=["methods/stages/curate/test_label_prefix.py::test_the_prefix_carries_no_loss"],
)
class LabelPrefix(Stage):
    """prompt = [label] and a line break, completion = the text; column `label` stays."""

    asks_model = False
    row_by_row = True

    domain: str = ""  # stands before the label in brackets of its own, e.g. imdb

    def __call__(self, rows, roles):
        rows, out = list(rows), []
        for row in rows:
            if not row.get("completions"):
                continue
            label = text_of(roles, row["completions"][0]).strip()
            text = question(row).strip()
            turns = not isinstance(row["prompt"], str)
            start = prefix(label, self.domain)
            prompt = [{"role": "user", "content": start}] if turns else start
            completion = [{"role": "assistant", "content": text}] if turns else text
            out.append({**without(row), "prompt": prompt, "completions": [completion], "label": label})
        self.left(roles, len(rows) - len(out), len(rows), "they have no label")
        return out


def prefix(label: str, domain: str = "") -> str:
    """What a text of a class is written from."""
    before = f"[{domain}]" if domain else ""
    return f"{before}[{label}]\n"
