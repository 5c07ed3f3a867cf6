"""Environments: the shop, a class of a file, Gymnasium's, and how episodes are played and written down."""

from __future__ import annotations

import pytest

from luthier.errors import RecipeError
from luthier.methods.environments._episodes import after, begin, first, play
from luthier.methods.environments.site import links, way
from luthier.registry import build

COUNTER = """
class Counter:
    def __init__(self, row, seed):
        self.count, self.goal = 0, int(row["answer"])
    def reset(self):
        return "0"
    def step(self, action):
        self.count += 1 if action == "up" else -1
        return str(self.count), float(self.count == self.goal), self.count == self.goal
    def close(self):
        Counter.closed = True
class Still:
    def __init__(self, row, seed):
        pass
"""


def played(environment, row, actions, max_turns=20):
    """The episode of a policy that has a list of actions, one for each turn."""
    episode = begin(environment, {"id": "r", "prompt": "", **row}, "r", 0)
    todo = iter(actions)

    def answer(questions):
        return {row["id"]: {**row, "completions": [next(todo)]} for row in questions}

    for _ in play([episode], answer, str, max_turns):
        pass
    return episode


def test_every_page_of_the_shop_is_reached_by_its_way():
    site = build("environment", "site")
    for target in links():
        episode = played(site, {"goal_page": target}, way(target))
        assert episode.total == 1.0 and episode.over and len(episode.turns) == len(way(target))
    wrong = played(site, {"goal_page": "oak chair"}, way("red chair"))
    assert wrong.total == 0.0 and wrong.over
    lost = played(
        site, {"goal_page": "oak chair"}, ["click nothing", "I look.\nclick Furniture", "back", "stop"]
    )
    assert [turn.observation.split("\n")[0] for turn in lost.turns] == [
        "Page: shop",
        "No such action.",
        "Page: furniture",
        "Page: shop",
    ]
    with pytest.raises(RecipeError, match="no page of the shop"):
        played(site, {"goal_page": "moon"}, ["stop"])


def test_a_class_of_a_file(tmp_path):
    file = tmp_path / "counter.py"
    file.write_text(COUNTER)
    counter = build("environment", {"name": "function", "path": f"{file}:Counter"})
    episode = played(counter, {"answer": "2"}, ["up", "down", "up", "up", "up"])
    assert episode.rewards == [0.0, 0.0, 0.0, 1.0] and episode.over
    assert type(episode.world).closed
    assert not played(counter, {"answer": "9"}, ["up"] * 3, max_turns=3).over
    with pytest.raises(RecipeError, match="no function or class 'Gone'"):
        build("environment", {"name": "function", "path": f"{file}:Gone"})
    with pytest.raises(RecipeError, match="has no method 'reset'"):
        played(build("environment", {"name": "function", "path": f"{file}:Still"}), {}, ["up"])


def test_an_outcome_that_is_none_is_refused(tmp_path):
    file = tmp_path / "counter.py"
    for outcome, why in (
        ("'text'", "must return an observation"),
        ("'', float('nan'), True", "finite number"),
    ):
        name = f"World{abs(hash(outcome))}"
        file = tmp_path / f"{name}.py"
        body = f"class {name}:\n    def __init__(self, row, seed): pass\n    def reset(self): return ''\n"
        file.write_text(f"{body}    def step(self, action): return {outcome}\n")
        with pytest.raises(RecipeError, match=why):
            played(build("environment", {"name": "function", "path": f"{file}:{name}"}), {}, ["x"])


def test_gymnasium():
    gymnasium = pytest.importorskip("gymnasium")
    lake = build(
        "environment",
        {
            "name": "gymnasium",
            "id": "FrozenLake-v1",
            "kwargs": {"is_slippery": False},
            "actions": ["left", "down", "right", "up"],
            "observation": "field {observation}",
            "invalid": -0.5,
        },
    )
    steps = ["jump", "down", "1", "right", "right", "down", "right"]
    episode = played(lake, {}, steps)
    assert episode.rewards == [-0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0] and episode.over
    assert episode.turns[1].observation == "'jump' is no action.\nfield 0"
    with pytest.raises(RecipeError, match="environment 'gymnasium'"):
        played(build("environment", {"name": "gymnasium", "id": "NoSuchWorld-v0"}), {}, ["x"])
    assert gymnasium


def test_prompts_hold_the_whole_history():
    assert first("Find it.", "Page: a") == "Find it.\nPage: a\n"
    assert after("Find it.\nPage: a\n", "click b", "Page: b") == "Find it.\nPage: a\nclick b\nPage: b\n"
    system = {"role": "system", "content": "Act."}
    assert first([system], "a") == [system, {"role": "user", "content": "a"}]
    chat = first([system, {"role": "user", "content": "Find it."}], "a")
    assert chat == [system, {"role": "user", "content": "Find it.\n\na"}]
    assert after(chat, "x", "b")[2:] == [
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "b"},
    ]
    parts = [{"role": "user", "content": [{"type": "image"}]}]
    assert first(parts, "a")[0]["content"][1] == {"type": "text", "text": "a"}
