"""Search trees of solutions: what the stages share that build one for each row, a step at a time.

An edge is a step that the policy has sampled, up to and with a separator; without one it is the last step.
All rows' trees grow together, so that a turn of the search is one call of the sampler. Samples follow from
the seed, the step and the row's id, so a search that is done again is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.stages._base import Stage, best_first, completion_logprobs, pieces, text_of, without
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import Range, family

ASK = "Is this answer right as far as it goes? Reply with yes or no only."


@dataclass(eq=False)
class Node:
    """A beginning of a solution. The root is the empty one."""

    ids: list[int] = field(default_factory=list)  # tokens of its step
    step: str = ""
    parent: Node | None = None
    logprob: float = 0.0  # of its step, under the policy
    end: bool = False  # the solution is finished
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    value: float = 0.0  # as it was evaluated when it was new
    total: float = 0.0  # what the search has made of it: a mean or a sum, as the method says

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def text(self) -> str:
        """All steps so far."""
        return "" if self.parent is None else self.parent.text + self.step

    def path(self) -> list[Node]:
        """From the root to this one."""
        return [*(self.parent.path() if self.parent else []), self]


@family
class TreeSearch(Stage):
    """Family: a method says which child is visited next, what a new node is worth, what a visit leaves
    behind, and which pairs a tree gives.
    """

    iterations: Annotated[int, Field(ge=1), Range(4, 64, log=True)] = 16  # turns of the search
    width: Annotated[int, Field(ge=2), Range(2, 5)] = 2  # steps that are sampled at each node
    depth: Annotated[int, Field(ge=1), Range(2, 8)] = 3  # steps of a solution at most
    step_tokens: Annotated[int, Field(ge=1)] = 64  # maximum tokens of a step
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    separator: str = "\n"  # text that ends a step
    exploration: Annotated[float, Field(ge=0), Range(0.2, 4.0, log=True)] = 1.0  # c of the search
    ask: str = ASK  # what asks the policy whether it is right so far
    draw: int = 0  # number of the draw; another number gives other samples

    def priority(self, parent: Node, child: Node) -> float:
        """Of the children of a node the one of highest priority is visited."""
        raise NotImplementedError

    def evaluate(self, roles: Any, nodes: Sequence[tuple[dict, Node]]) -> None:
        """Write the value of new nodes. nodes: each with its row."""
        raise NotImplementedError

    def visit(self, path: Sequence[Node]) -> None:
        """Write visits and totals of the nodes from the root to the one that was reached."""
        raise NotImplementedError

    def pairs(self, row: dict, root: Node) -> list[dict]:
        """The rows that a finished tree gives."""
        raise NotImplementedError

    def __call__(self, rows, roles):
        rows = list(rows)
        roots = self.search(rows, roles)
        out, used = [], set()
        for place, (row, root) in enumerate(zip(rows, roots, strict=True)):
            pairs = self.pairs(row, root)
            out += pairs
            if pairs:
                used.add(place)
        if rows:
            right = [self.best_score(root) for root in roots]
            self.measure(roles, pairs=len(out), best_value=sum(right) / len(right))
        self.drop(roles, rows, used, "their trees have no two steps that differ enough")
        return out

    def search(self, rows: Sequence[dict], roles: Any) -> list[Node]:
        """A tree for each row."""
        roots = [Node() for _ in rows]
        for turn in range(self.iterations):
            leaves = [self.descend(root) for root in roots]
            self.expand(turn, rows, leaves, roles)
            for leaf in leaves:
                self.visit((self.favourite(leaf) if leaf.children else leaf).path())
        return roots

    def favourite(self, node: Node) -> Node:
        """The child that is visited next; of equals the first."""
        return max(node.children, key=lambda child: self.priority(node, child))

    def descend(self, node: Node) -> Node:
        """The leaf where the search goes on."""
        while node.children:
            node = self.favourite(node)
        return node

    def expand(self, turn: int, rows: Sequence[dict], leaves: Sequence[Node], roles: Any) -> None:
        """Sample steps behind the leaves that are not finished, each different step once."""
        requests = []
        for place, (row, leaf) in enumerate(zip(rows, leaves, strict=True)):
            if not leaf.end:
                begun = row.get("prefix", "") + leaf.text
                bare = without(row, "prefix")
                requests.append({**bare, "id": f"{row['id']}/{turn}", "prefix": begun, "place": place})
        how = {"n": self.width, "max_new_tokens": self.step_tokens, "temperature": self.temperature}
        new: list[tuple[dict, Node]] = []
        written = list(Rollout(**how, draw=self.draw)(requests, roles)) if requests else []
        reached = {row["place"] for row in written}
        for row in written:
            leaf = leaves[row["place"]]
            for ids in row["completions"]:
                child = self.step(roles, leaf, ids)
                if child.step not in [other.step for other in leaf.children]:
                    leaf.children.append(child)
                    new.append((rows[row["place"]], child))
        for request in requests:
            if request["place"] not in reached:  # its prompt leaves no room
                leaves[request["place"]].end = True
        self.likelihoods(roles, new)
        if new:
            self.evaluate(roles, new)

    def step(self, roles: Any, parent: Node, ids: list[int]) -> Node:
        """The first step of a sample."""
        text, count = "", 0
        for piece in pieces(roles, ids):
            text, count = text + piece, count + 1
            if self.separator in text and text.strip():
                break
        ended = self.separator not in text or parent.depth + 1 >= self.depth
        # a last step is as its reader sees it, without the token that ends it
        step = text_of(roles, ids[:count]) if self.separator not in text else text
        return Node(ids[:count], step, parent, end=ended)

    def likelihoods(self, roles: Any, nodes: Sequence[tuple[dict, Node]]) -> None:
        """Write how likely the policy finds the steps of new nodes."""
        rows = []
        for row, node in nodes:
            begun = row.get("prefix", "") + (node.parent.text if node.parent else "")
            rows.append({**without(row), "prefix": begun, "completions": [node.ids]})
        for (_, node), (logs,) in zip(nodes, completion_logprobs(roles.policy, roles, rows, 8), strict=True):
            node.logprob = sum(logs)

    def best_score(self, root: Node) -> float:
        """The highest value of a finished solution in a tree; 0 where none is finished."""
        values, waiting = [], [root]
        while waiting:
            node = waiting.pop()
            waiting += node.children
            if node.end and node.parent is not None:
                values.append(node.value)
        return max(values, default=0.0)

    def confidences(self, roles: Any, nodes: Sequence[tuple[dict, Node]]) -> list[float]:
        """Of each node the probability of yes, of yes and no, to the question whether it is right."""
        rows = []
        for row, node in nodes:
            answer, prompt = row.get("prefix", "") + node.text, row["prompt"]
            replies = ["yes", "no"]
            if isinstance(prompt, str):
                prompt, replies = f"{prompt}{answer}\n{self.ask}\n", [" yes", " no"]
            else:
                turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": self.ask}]
                prompt = [*prompt, *turns]
            rows.append({**without(row, "prefix"), "prompt": prompt, "completions": replies})
        out = []
        for yes, no in completion_logprobs(roles.policy, roles, rows, 8):
            out.append(1 / (1 + math.exp(min(sum(no) - sum(yes), 500.0))))
        return out

    def pair(self, row: dict, parent: Node, chosen: Node, rejected: Node, **columns: Any) -> dict:
        """Two steps behind one beginning, the better one first."""
        return {
            **without(row),
            "id": f"{row['id']}/{parent.depth}",
            "prefix": row.get("prefix", "") + parent.text,
            "completions": [chosen.ids, rejected.ids],
            **columns,
        }


def reference_of(roles: Any, row: dict) -> str:
    """A row's own answer, the best where they have scores; empty where it has none."""
    if not row.get("completions"):
        return ""
    place = best_first(row)[0] if row.get("scores") else 0
    return text_of(roles, row["completions"][place])
