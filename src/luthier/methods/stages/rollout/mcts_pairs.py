"""Preference pairs of single steps by Monte Carlo tree search: at each depth the step that the search favours
against the one that it favours least, behind the same beginning (MCTS-DPO).

PUCT chooses the child with the highest Q + c p sqrt(N of the parent) / (1 + N), where p is how likely the
policy finds the step, exp(sum of log-probabilities / length^1.25). A new node is worth how sure the policy
is that it is right (the probability of yes, divided by depth - 3 from there on), and at its end +1 or -1 by
the reward. Q of a step is what its value adds to its parent's, and gamma times the mean Q behind it, by
visits. Trained on with objective `mcts_dpo`. Departs: one tree a prompt, from its beginning; the paper
searches again from each step that it has taken. The starting answer of a row is not put into the tree.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE, LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.objectives.preference.mcts_dpo import VISITS
from luthier.methods.stages._base import CACHED_LOGPROBS, OLD_LOGPROBS, SAMPLES
from luthier.methods.stages.rollout._tree import Node, TreeSearch
from luthier.registry import nested, stage


@stage(
    example={"iterations": 2, "step_tokens": 3, "reward": "length"},
    paper="arXiv:2405.00451",
    row="mcts-dpo",
    requires=[GENERATE, LOGPROBS],
    provides=[COMPLETIONS, PAIRS, SCORES, VISITS],
    removes=[OLD_LOGPROBS, CACHED_LOGPROBS, SAMPLES],
    use_when="answers can be checked and are written in steps: pairs of steps say where a solution turns"
    " right or wrong, which pairs of whole answers cannot.",
    costs="`iterations` times `width` samples of a step, and a question about each, for every row.",
    covers="PUCT with self-evaluation and outcomes, pairs of steps by visits at each depth.",
    omits="search that begins again from each step that is taken; the paper's benchmarks.",
    tests=[
        "methods/stages/rollout/test_mcts_pairs.py::test_visits_and_values_order_steps_as_enumeration_does",
        "methods/stages/rollout/test_mcts_pairs.py::test_pairs_share_their_beginning",
        "methods/stages/rollout/test_mcts_pairs.py::test_a_step_is_worth_what_it_adds",
    ],
)
class MCTSPairs(TreeSearch):
    """Columns `prefix`, `completions` [chosen step, rejected step], `scores` (their Q) and `visits`. Rows in
    whose trees no visited siblings differ are dropped.
    """

    reward: Annotated[Any, nested("reward")] = "exact_match"  # the reward that scores whole solutions
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0  # how much what is behind a step counts
    confidence: Annotated[float, Field(ge=0)] = 1.0  # weight of self-evaluation; 0: it is not asked
    right: float = 0.5  # a solution with at least this reward counts +1, else -1
    length_power: float = 1.25  # of the length of a step, in how likely it is

    def priority(self, parent, child):
        likely = math.exp(child.logprob / max(1, len(child.ids)) ** self.length_power)
        return child.total + self.exploration * likely * math.sqrt(parent.visits) / (1 + child.visits)

    def evaluate(self, roles, nodes):
        sure = self.confidences(roles, nodes) if self.confidence else [0.0] * len(nodes)
        for (row, node), p in zip(nodes, sure, strict=True):
            node.value = self.confidence * p / max(node.depth - 3, 1)
            if node.end:
                node.value += 1.0 if self.solved(row, node) >= self.right else -1.0
            node.total = node.value - node.parent.value

    def solved(self, row: dict, node: Node) -> float:
        """The reward of a whole solution."""
        return self.reward.scores(row, [row.get("prefix", "") + node.text])[0]

    def visit(self, path):
        for node in reversed(path):
            node.visits += 1
            before = 0.0 if node.parent is None else node.parent.value
            visits = sum(child.visits for child in node.children)
            mean = sum(child.visits * child.total for child in node.children) / max(1, visits)
            node.total = node.value - before + self.gamma * mean

    def pairs(self, row, root):
        out, node = [], root
        while node.children:
            ranked = sorted(node.children, key=lambda child: (child.visits, child.total))
            chosen, rejected = ranked[-1], ranked[0]
            if rejected.visits and chosen.total > rejected.total:
                scores, visits = [chosen.total, rejected.total], [chosen.visits, rejected.visits]
                out.append(self.pair(row, node, chosen, rejected, scores=scores, visits=visits))
            node = chosen
        return out
