"""epicoder: draws by tempered frequencies, merging, evolution, debugging."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from helpers.synthesis import Scripted, nobody
from luthier.methods.stages.synthesize.epicoder import Tree
from luthier.registry import build

SEEDS = [{"id": f"s{k}", "prompt": "", "completions": [f"def f(x): return x + {k}"]} for k in range(2)]


def tree_of(counts: dict[str, int]) -> Tree:
    tree = Tree()
    for name, count in counts.items():
        tree.add({name: [f"{name}1", f"{name}2"]}, count)
    return tree


@pytest.mark.parametrize("temperature, want", [(1.0, [0.7, 0.2, 0.1]), (2.0, None), (1e9, [1 / 3] * 3)])
def test_frequencies_are_the_tempered_softmax(temperature, want):
    tree, rng = tree_of({"a": 7, "b": 2, "c": 1}), torch.Generator().manual_seed(0)
    draws = Counter(next(iter(tree.draw([1], temperature, rng))) for _ in range(4000))
    chance = (torch.tensor([7.0, 2.0, 1.0]).log() / temperature).softmax(0).tolist()
    assert want is None or chance == pytest.approx(want, rel=1e-5)
    for name, share in zip("abc", chance, strict=True):
        assert draws[name] / 4000 == pytest.approx(share, abs=0.03)


def test_a_subtree_has_so_many_children_at_each_depth():
    tree, rng = tree_of({name: 1 for name in "abcde"}), torch.Generator().manual_seed(0)
    for _ in range(20):
        part = tree.draw([3, 1], 1.0, rng)
        assert len(part) == 3 and all(len(inner) == 1 for inner in part.values())
    assert all(not deep for inner in tree.draw([5, 2], 1.0, rng).values() for deep in inner.values())


def test_merging_adds_counts_and_loses_no_leaf():
    tree = Tree()
    tree.add({"data": {"list": ["sort", "search"]}, "loop": []})
    tree.add({"data": {"list": ["sort"], "dict": ["count"]}})
    assert tree.children["data"].count == 2 and tree.children["data"].children["list"].count == 2
    before = tree.leaves()
    assert before == {
        ("data", "list", "sort"),
        ("data", "list", "search"),
        ("data", "dict", "count"),
        ("loop",),
    }
    tree.extend({"data": {"list": ["sort", "merge"], "heap": ["push"]}})
    assert before < tree.leaves() and tree.children["data"].count == 2
    lists = tree.children["data"].children["list"].children
    assert lists["merge"].count == pytest.approx(1.5) and lists["sort"].count == 2


def script(hopeless: bool):
    def reply(prompt: str, seed: int) -> str:
        if prompt.startswith("Which features"):
            return 'Sure: {"math": {"arithmetic": ["add", "double"]}}'
        if prompt.startswith("Extend"):
            return '{"math": {"arithmetic": ["halve"]}, "text": ["reverse"]}'
        if prompt.startswith("Write a programming task"):
            return "Double a number."
        right = not hopeless and prompt.startswith("This solution") and "return 3 * x" in prompt
        body = "2 * x" if right else "3 * x" if prompt.startswith("This") else "x +"
        code = f"[Response]\ndef double(x):\n    return {body}\n[/Response]"
        return f"{code}\n[Tests]\nassert double(4) == 8\n[/Tests]"

    return Scripted(reply)


def test_bugs_are_mended_and_hopeless_tasks_leave():
    """A syntax error, then a wrong number, then right: two turns."""
    settings = {"name": "epicoder", "n": 2, "evolutions": 1, "timeout": 3.0}
    out = list(build("stage", {**settings, "writer": script(False)})(SEEDS, nobody()))
    assert len(out) == 2 and all(row["turns"] == 2 and "2 * x" in row["completions"][0] for row in out)
    assert all(row["tests"] == "assert double(4) == 8" and row["features"] for row in out)
    assert out[0]["provenance"]["sources"] == ["s0", "s1"]
    roles = nobody()
    assert not list(build("stage", {**settings, "n": 1, "turns": 1, "writer": script(True)})(SEEDS, roles))
    assert "1 was not solved" in roles.sentences[-1] and {*roles.dropped} == {"s0", "s1"}
