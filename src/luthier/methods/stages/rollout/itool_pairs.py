"""Preference pairs of tool calls, step by step, by a short tree search that compares with the reference
(iTool).

Of the children of a node the one with the highest V / (n + 1) + c p sqrt(log N / (n + 1)) is visited, V the
sum of what its visits found and p how likely the policy finds a token of the step. A new node is worth how
much its text overlaps with the reference, less 1/2, and 0.1 more or less for brackets and for parentheses
that close or do not; with `confidence` also how sure the policy is that it is right. At every node the best
step is preferred to the worst where both differ enough. Departs: the overlap is difflib's ratio of the text
so far.
"""

from __future__ import annotations

import math
from difflib import SequenceMatcher
from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import GENERATE, LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import CACHED_LOGPROBS, OLD_LOGPROBS, SAMPLES
from luthier.methods.stages.rollout._tree import Node, TreeSearch, reference_of
from luthier.registry import Range, stage


@stage(
    example={"iterations": 1, "step_tokens": 3, "gap": 0.0, "least": -1.0},
    paper="arXiv:2501.09766",
    row="itool",
    requires=[COMPLETIONS, GENERATE, LOGPROBS],
    provides=[PAIRS, SCORES],
    removes=[OLD_LOGPROBS, CACHED_LOGPROBS, SAMPLES],
    contract={"gives": "a tiny model writes nothing that overlaps with the reference"},
    use_when="rows have reference tool calls that the model nearly gets right: pairs say in which fragment it"
    " goes wrong.",
    costs="`iterations` times `width` samples of a step for every row.",
    covers="the search by overlap and format, pairs at every node by three thresholds.",
    omits="the paper's exact measure of overlap.",
    tests=[
        "methods/stages/rollout/test_itool_pairs.py::test_five_searches_find_the_best_child",
        "methods/stages/rollout/test_itool_pairs.py::test_pairs_meet_the_thresholds",
    ],
)
class IToolPairs(TreeSearch):
    """Columns `prefix`, `completions` [better step, worse step] and `scores`. Rows without such a pair
    leave.
    """

    iterations: Annotated[int, Field(ge=1), Range(3, 20)] = 5  # turns of the search
    width: Annotated[int, Field(ge=2), Range(2, 5)] = 3  # steps that are sampled at each node
    temperature: Annotated[float, Field(gt=0)] = 1.5  # sampling temperature
    separator: str = ","  # text that ends a step
    confidence: Annotated[float, Field(ge=0)] = 0.0  # weight of self-evaluation; 0: it is not asked
    gap: Annotated[float, Field(ge=0)] = 0.1  # least difference of two values
    least: float = -0.3  # smallest value of the better step
    overlap: Annotated[float, Field(ge=0, le=1)] = 0.95  # largest overlap of two steps

    def __call__(self, rows, roles):
        return super().__call__(self.usable(rows, roles), roles)

    def priority(self, parent, child):
        likely = math.exp(child.logprob / max(1, len(child.ids)))
        wide = math.sqrt(math.log(max(1, parent.visits)) / (child.visits + 1))
        return child.total / (child.visits + 1) + self.exploration * likely * wide

    def evaluate(self, roles, nodes):
        sure = self.confidences(roles, nodes) if self.confidence else [0.0] * len(nodes)
        for (row, node), p in zip(nodes, sure, strict=True):
            text = row.get("prefix", "") + node.text
            node.value = worth(text, reference_of(roles, row)) + self.confidence * p

    def visit(self, path):
        for node in path:
            node.visits += 1
            node.total += path[-1].value

    def pairs(self, row, root):
        out, waiting = [], [root]
        while waiting:
            node = waiting.pop(0)
            waiting += node.children
            if len(node.children) < 2:
                continue
            best, worst = max(node.children, key=mean), min(node.children, key=mean)
            alike = SequenceMatcher(None, best.step, worst.step, autojunk=False).ratio()
            if mean(best) - mean(worst) >= self.gap and mean(best) >= self.least and alike <= self.overlap:
                pair = self.pair(row, node, best, worst, scores=[mean(best), mean(worst)])
                out.append({**pair, "id": f"{pair['id']}/{len(out)}"})
        return [pair for pair in out if pair["scores"][0] > pair["scores"][1]]


def mean(node: Node) -> float:
    """What visits of a node found; of one without visits its own value."""
    return node.total / node.visits if node.visits else node.value


def worth(text: str, reference: str) -> float:
    """The fast value of a text: overlap less 1/2, and 0.1 for each kind of brackets, if it is used at all."""
    value = SequenceMatcher(None, text, reference, autojunk=False).ratio() - 0.5
    for opening, closing in ("[]", "()"):
        if opening in text or closing in text:
            value += 0.1 if text.count(opening) == text.count(closing) else -0.1
    return value
