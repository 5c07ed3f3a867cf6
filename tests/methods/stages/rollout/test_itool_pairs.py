"""itool_pairs: the search on a small tree, its sums, and the thresholds of pairs."""

from __future__ import annotations

from difflib import SequenceMatcher

import pytest

from helpers.rounds import scripted
from luthier.methods.stages.rollout.itool_pairs import IToolPairs, mean, worth
from luthier.recipe.recipe import Recipe
from luthier.registry import build

GOLD = "[add(1,2,3)]"
STEPS = ("[add(1,", "zzzz,", "(((z,", "2,", "3)]")
ROWS = [{"id": str(k), "prompt": "add", "completions": [GOLD]} for k in range(6)]


def reply(prompt: str, seed: int) -> str:
    written = prompt.removeprefix("add")
    if not written:
        return STEPS[seed % 3] + "rest,"
    return ("2,", "7,", "3)]", "x]")[seed % 4]


class Recorded(IToolPairs):
    """Notes the path of every visit."""

    def visit(self, path):
        self.__dict__.setdefault("paths", []).append([(id(node), node.value) for node in path])
        super().visit(path)


def nodes(root):
    out = [root]
    for node in out:
        out += node.children
    return out


def test_five_searches_find_the_best_child():
    stage, roles = Recorded(width=3), scripted(reply, lambda character: -0.5)
    roots = stage.search(ROWS, roles)
    for root in roots:
        assert max(root.children, key=mean).step == "[add(1,"
        assert root.visits == 5
        for node in nodes(root):
            values = [path[-1][1] for path in stage.paths if id(node) in [place for place, _ in path]]
            assert node.visits == len(values) and node.total == pytest.approx(sum(values))


def test_pairs_meet_the_thresholds():
    roles = scripted(reply, lambda character: -0.5)
    loose = build("stage", {"name": "itool_pairs", "gap": 0.0, "least": -9.0, "overlap": 1.0})
    stage = build("stage", {"name": "itool_pairs", "gap": 0.15, "least": 0.0, "overlap": 0.6})
    pairs = stage(ROWS, roles)
    assert 0 < len(pairs) < len(loose(ROWS, roles)) and len({pair["id"] for pair in pairs}) == len(pairs)
    right = [0, 0]
    for pair in pairs:
        better, worse = map(roles.text, pair["completions"])
        assert pair["scores"][0] - pair["scores"][1] >= 0.15 and pair["scores"][0] >= 0.0
        assert SequenceMatcher(None, better, worse, autojunk=False).ratio() <= 0.6
        for side, step in enumerate((better, worse)):
            right[side] += GOLD.startswith(pair["prefix"] + step)
    assert right[0] > right[1]


def test_the_fast_value():
    assert worth(GOLD, GOLD) == pytest.approx(0.7)
    assert worth("[add(1,", GOLD) == pytest.approx(2 * 7 / 19 - 0.5 - 0.2)
    assert worth("", GOLD) == -0.5


def test_rounds_search_the_hardest_rows():
    plan = build("plan", {"name": "itool", "share": 0.25, "gap": 0.2})
    play = plan.recipes(Recipe.load({"model": "toy:lm"}))
    first = next(play)
    names = [stage if isinstance(stage, str) else stage["name"] for stage in first.stages]
    assert names == ["perplexity", "top", "itool_pairs", "provenance"]
    assert first.stages[1]["share"] == 0.25 and first.stages[2]["gap"] == 0.2
    assert first.objective == {"name": "simpo", "beta": 2.5}
