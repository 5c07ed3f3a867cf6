"""Lifts rows from their field: phrases that name things become prop_1, prop_2, ... in prompt and answer, so
that what is learned of their logic holds in other fields (NL2TL).

A row says its phrases in `propositions`, a list of [phrase in the prompt, name in the answer]. They are
numbered by their place in the prompt; the longest phrase is replaced first where one is part of another. A
row whose prompt lacks one of its phrases, or that has such a placeholder already, is dropped. The lifted row
keeps its phrases in the order of their numbers, from which `ground` writes the answer of its field again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage
from luthier.registry import Column, stage

PROPOSITIONS = Column(
    "propositions",
    says="phrases of the prompt, each with its name in the answer (column `propositions`)",
    example=([["what is", "what"]], [["what is", "question"]]),
)
PLACEHOLDER = re.compile(r"\bprop_(\d+)\b")


@stage(
    paper="arXiv:2305.07766",
    requires=[COMPLETIONS, PROPOSITIONS],
    use_when="sentences become formulas, in several fields whose words differ and whose logic does not.",
    costs="searching each row's texts.",
)
class Lift(Stage):
    """Prompt and completions with placeholders; `propositions` in the order of their numbers."""

    asks_model = False

    def __call__(self, rows, roles):
        rows, out = list(rows), []
        for row in rows:
            lifted = lift(row)
            if lifted is not None:
                out.append(lifted)
        why = "their prompt lacks one of their `propositions`, or has a placeholder already"
        self.left(roles, len(rows) - len(out), len(rows), why)
        return out


def lift(row: dict) -> dict | None:
    """A row with placeholders; None where that cannot be undone."""
    pairs = [(str(phrase), str(name)) for phrase, name in row.get("propositions") or ()]
    texts = [row["prompt"], *row["completions"]]
    if not all(isinstance(text, str) and not PLACEHOLDER.search(text) for text in texts):
        return None
    if not pairs or not all(phrase in row["prompt"] for phrase, _ in pairs):
        return None
    pairs.sort(key=lambda pair: row["prompt"].index(pair[0]))
    marks = [f"prop_{number}" for number in range(1, len(pairs) + 1)]
    prompt = exchange(row["prompt"], [phrase for phrase, _ in pairs], marks)
    names = [name for _, name in pairs]
    completions = [exchange(text, names, marks) for text in row["completions"]]
    return {**row, "prompt": prompt, "completions": completions, "propositions": [list(p) for p in pairs]}


def ground(text: str, propositions: Sequence[Sequence[str]]) -> str:
    """A lifted answer in the words of its field; placeholders without a phrase stay."""

    def name(match: re.Match) -> str:
        number = int(match[1])
        return propositions[number - 1][1] if 1 <= number <= len(propositions) else match[0]

    return PLACEHOLDER.sub(name, text)


def exchange(text: str, words: Sequence[str], others: Sequence[str]) -> str:
    """Whole words by others, all at once, so that none is exchanged twice; the longest first."""
    by_word = dict(zip(words, others))
    longest = sorted(by_word, key=len, reverse=True)
    pattern = "|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in longest)
    return re.sub(pattern, lambda match: by_word[match[0]], text)
