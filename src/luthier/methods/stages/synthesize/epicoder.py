"""EpiCoder: code tasks from a tree of features, with solutions that are debugged until their tests pass.

The writer reads each seed program and gives its features as a nested tree; all trees are merged, with how
often each feature occurs. `evolutions` times a subtree is shown to the writer, which extends it in depth and
breadth; what is new gets the mean frequency of its siblings. For each new row a subtree is drawn: `children`
says how many children are chosen at each depth, with probability softmax(log frequency / temperature),
without repeating one. From it the writer makes a task, a solution and tests; what fails in the sandbox goes
back with its error, `turns` times, and what never passes leaves (Wang et al., 2025). Departs: seeds are
chosen by stages before this one (`k_center`); one file a task.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import text_of
from luthier.methods.stages.synthesize._synthesis import Author, Synthesis, json_in, section
from luthier.registry import stage
from luthier.sandbox.code import extract_code
from luthier.sandbox.sandbox import run

FEATURES = (
    "Which features does this code have (workflow, functionality, data structures, algorithms, ...)? Reply"
    " with a JSON object, nested from the general to the special; the innermost values are lists.\n\n{code}"
)
EVOLVE = (
    "Extend this tree of features of code in depth and breadth. Reply with the whole tree as a JSON object"
    " of the same form.\n\n{tree}"
)
TASK = (
    "Write a programming task in Python that needs features of this tree which go together. Write the task"
    " alone.\n\n{tree}"
)
SOLVE = (
    "Solve this task in Python, and write assertions that test the solution. Put the solution between"
    " [Response] and [/Response], and the assertions between [Tests] and [/Tests].\n\n{task}"
)
DEBUG = (
    "This solution and its tests fail: {error}\nMend whichever is wrong, and write both again, in the same"
    " form.\n\nTask:\n{task}\n\n[Response]\n{code}\n[/Response]\n[Tests]\n{tests}\n[/Tests]"
)


class Tree:
    """Features by name, with how often each occurs."""

    def __init__(self, count: float = 0.0):
        self.count = count
        self.children: dict[str, Tree] = {}

    def add(self, nested: Any, count: float = 1.0) -> None:
        """Merge what a writer gave: objects, lists and names. Counts add up."""
        if isinstance(nested, dict):
            for name, inner in nested.items():
                child = self.children.setdefault(str(name), Tree())
                child.count += count
                child.add(inner, count)
        elif isinstance(nested, list):
            for inner in nested:
                self.add(inner, count)
        elif nested not in (None, ""):
            self.children.setdefault(str(nested), Tree()).count += count

    def extend(self, nested: Any) -> None:
        """Add what is not there yet, at the mean count of its siblings; what is there stays."""
        counts = [child.count for child in self.children.values()]
        mean = sum(counts) / len(counts) if counts else max(1.0, self.count)
        parts = nested if isinstance(nested, list) else [nested]
        for part in parts:
            pairs = part.items() if isinstance(part, dict) else [(part, None)]
            for name, inner in pairs:
                if name in (None, ""):
                    continue
                child = self.children.setdefault(str(name), Tree(mean))
                if inner:
                    child.extend(inner)

    def nested(self) -> dict[str, Any]:
        """As JSON."""
        return {name: child.nested() for name, child in self.children.items()}

    def leaves(self) -> set[tuple[str, ...]]:
        """Paths of features without finer ones."""
        if not self.children:
            return {()}
        out = set()
        for name, child in self.children.items():
            out |= {(name, *path) for path in child.leaves()}
        return out

    def draw(self, children: list[int], temperature: float, rng: torch.Generator) -> dict[str, Any]:
        """A subtree with at most so many children at each depth."""
        if not children or not self.children:
            return {}
        names = list(self.children)
        counts = torch.tensor([self.children[name].count for name in names], dtype=torch.float64)
        chance = (counts.log() / temperature).softmax(0)
        n = min(children[0], len(names))
        places = torch.multinomial(chance, n, generator=rng).tolist()
        return {
            names[k]: self.children[names[k]].draw(children[1:], temperature, rng) for k in sorted(places)
        }


@stage(
    example={"n": 1, "evolutions": 0, "max_new_tokens": 4},
    paper="arXiv:2501.04694",
    row="epicoder",
    requires=[COMPLETIONS, GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="a few programs are at hand, and tasks are wanted that are more varied and harder than these.",
    costs="a reply for each seed and each evolution, two for each new row, one more for each turn of"
    " debugging, and runs in the sandbox.",
    covers="the tree with frequencies, merging, evolution, drawing by temperature and depth, tasks,"
    " solutions with tests, debugging.",
    omits="projects of several files, measures of complexity, the choice of seeds, the models tuned on the"
    " rows.",
    contract={"gives": "a tiny model writes no program that passes its tests"},
    tests=[
        "methods/stages/synthesize/test_epicoder.py::test_frequencies_are_the_tempered_softmax",
        "methods/stages/synthesize/test_epicoder.py::test_merging_adds_counts_and_loses_no_leaf",
        "methods/stages/synthesize/test_epicoder.py::test_bugs_are_mended_and_hopeless_tasks_leave",
    ],
)
class EpiCoder(Synthesis):
    """`n` new rows: task and solution; columns `tests`, `features`, `turns`, `provenance`."""

    n: Annotated[int, Field(ge=1)] = 100  # tasks that are tried
    evolutions: Annotated[int, Field(ge=0)] = 20  # extensions of a subtree
    # children that are drawn at each depth, from the top; more and deeper ones make harder tasks
    children: tuple[Annotated[int, Field(ge=1)], ...] = (2, 2, 2)
    sharpness: Annotated[float, Field(gt=0)] = 10.0  # temperature of the draw: 1 is by frequency, inf even
    turns: Annotated[int, Field(ge=0)] = 3  # of debugging
    timeout: Annotated[float, Field(gt=0)] = 5.0  # seconds of a program and its tests
    memory_mb: Annotated[int, Field(ge=16)] = 512  # of a program

    def __call__(self, rows, roles):
        rows = [row for row in rows if row.get("completions")]
        author = self.author(roles)
        tree = self.evolved(author, self.tree(author, rows))
        if not rows or not tree.children:
            return author.finish(rows, [], "no feature of it could be read")
        out = []
        for number in range(self.n):
            rng = roles.clock.rng(self.name, "features", number, at=0)
            features = tree.draw(list(self.children), self.sharpness, rng)
            prompt = TASK.replace("{tree}", json.dumps(features))
            (task,) = author.ask([prompt], [f"task {number}"])
            solved = self.solved(author, number, task.strip())
            if solved is None:
                continue
            code, tests, turns = solved
            columns = {"tests": tests, "features": features, "turns": turns}
            new = author.row(rows[0], f"task-{number}", task.strip(), f"```python\n{code}\n```", **columns)
            new["provenance"]["sources"] = [str(row["id"]) for row in rows]
            out.append(new)
        return author.finish(rows, out, "no task of its features was solved")

    def tree(self, author: Author, rows: list[dict]) -> Tree:
        """The features of all seeds."""
        tree = Tree()
        prompts = [FEATURES.replace("{code}", text_of(author.roles, row["completions"][0])) for row in rows]
        replies = author.ask(prompts, [f"{row['id']} features" for row in rows], 0.0)
        for row, reply in zip(rows, replies, strict=True):
            nested = json_in(reply)
            if isinstance(nested, dict):
                tree.add(nested)
            else:
                author.reject(row["id"], reply, "is no tree of features")
        return tree

    def evolved(self, author: Author, tree: Tree) -> Tree:
        """The tree after the writer extended subtrees of it."""
        for number in range(self.evolutions if tree.children else 0):
            rng = author.roles.clock.rng(self.name, "evolution", number, at=0)
            part = tree.draw(list(self.children), self.sharpness, rng)
            prompt = EVOLVE.replace("{tree}", json.dumps(part))
            (reply,) = author.ask([prompt], [f"evolution {number}"])
            nested = json_in(reply)
            if isinstance(nested, dict):
                tree.extend(nested)
            else:
                author.reject("", reply, "is no tree of features")
        return tree

    def solved(self, author: Author, number: int, task: str) -> tuple[str, str, int] | None:
        """Solution, tests and turns of debugging; None where it never passes."""
        prompt = SOLVE.replace("{task}", task)
        for turn in range(self.turns + 1):
            (reply,) = author.ask([prompt], [f"solution {number} {turn}"])
            code = extract_code(section(reply, "Response") or "")
            tests = extract_code(section(reply, "Tests") or "")
            error = "it has no solution with tests"
            if code.strip() and tests.strip():
                limits = {"timeout": self.timeout, "memory_mb": self.memory_mb}
                result = run(code, checks=[tests], **limits)
                if result.ok:
                    return code, tests, turn
                error = result.reason
            prompt = DEBUG.replace("{error}", error).replace("{task}", task)
            prompt = prompt.replace("{code}", code).replace("{tests}", tests)
        author.reject("", task, "was not solved")
        return None
