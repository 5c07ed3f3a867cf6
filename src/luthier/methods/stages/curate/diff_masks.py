"""Marks where a right and a wrong program differ, in lines and in tokens, for objective `fait`.

Lines are compared as text, and the tokens of lines that differ as tokens, both by difflib.
"""

from __future__ import annotations

from difflib import SequenceMatcher

from luthier.methods.formats._base import PAIRS
from luthier.methods.stages._base import Stage, best_first, pieces
from luthier.registry import Column, stage

LINE_MASK = Column(
    "line_mask",
    per="token",
    says="marks of the lines in which a right and a wrong program differ (column `line_mask`)",
    example=(1.0, 0.0, 0.0),
)
TOKEN_MASK = Column(
    "token_mask",
    per="token",
    says="marks of the tokens in which a right and a wrong program differ (column `token_mask`)",
    example=(0.0, 1.0, 1.0),
)


@stage(
    paper="arXiv:2503.16913",
    row="fait",
    requires=[PAIRS],
    provides=[LINE_MASK, TOKEN_MASK],
    use_when="rows hold a right and a wrong program, for objective `fait`.",
    costs="a text comparison for each row.",
)
class DiffMasks(Stage):
    """Columns `line_mask` and `token_mask`: for each completion 1.0 at supervised tokens that differ between
    the best and the worst, else 0.0.
    """

    def __call__(self, rows, roles):
        for row in self.usable(rows, roles):
            encoded, order = roles.policy.architecture.encode(row, roles.renderer), best_first(row)
            tokens = [
                [t for t, m in zip(ids, marks, strict=True) if m]
                for ids, marks in zip(encoded.completions, encoded.supervised, strict=True)
            ]
            masks = [[[0.0] * len(ids) for ids in tokens] for _ in range(2)]
            pair = order[0], order[-1]
            for k, line, token in zip(
                pair, *differing(*([lines(roles, tokens[k]) for k in pair])), strict=True
            ):
                masks[0][k], masks[1][k] = line, token
            yield {**row, "line_mask": masks[0], "token_mask": masks[1]}


def lines(roles, ids: list[int]) -> list[tuple[str, list[int]]]:
    """Tokens cut into lines: (text, tokens) of each; a token that ends a line belongs to it."""
    out: list[tuple[str, list[int]]] = [("", [])]
    for token, text in zip(ids, pieces(roles, ids), strict=True):
        out[-1] = (out[-1][0] + text, [*out[-1][1], token])
        if "\n" in text:
            out.append(("", []))
    return out if out[-1][1] else out[:-1]


def differing(
    one: list[tuple[str, list[int]]], other: list[tuple[str, list[int]]]
) -> tuple[list[list[float]], list[list[float]]]:
    """Line masks of both sides, token masks of both sides."""
    sides = (one, other)
    line = [[0.0] * sum(len(t) for _, t in side) for side in sides]
    token = [list(mask) for mask in line]
    starts = [[sum(len(t) for _, t in side[:k]) for k in range(len(side) + 1)] for side in sides]
    matcher = SequenceMatcher(None, [t for t, _ in one], [t for t, _ in other], autojunk=False)
    for tag, *bounds in matcher.get_opcodes():
        if tag == "equal":
            continue
        spans = [(starts[s][bounds[2 * s]], starts[s][bounds[2 * s + 1]]) for s in range(2)]
        ids = [
            [t for _, tokens in side[bounds[2 * s] : bounds[2 * s + 1]] for t in tokens]
            for s, side in enumerate(sides)
        ]
        for s, (a, b) in enumerate(spans):
            line[s][a:b] = [1.0] * (b - a)
        for inner, *at in SequenceMatcher(None, *ids, autojunk=False).get_opcodes():
            for s, (a, _) in enumerate(spans):
                if inner != "equal":
                    token[s][a + at[2 * s] : a + at[2 * s + 1]] = [1.0] * (at[2 * s + 1] - at[2 * s])
    return line, token
