"""nnetnav: labels at fixed depths, pruning, and demonstrations."""

from __future__ import annotations

import random
import re

from helpers.synthesis import Scripted, nobody
from luthier.methods.environments.site import HOME
from luthier.registry import build

PERSONAS = [{"id": str(k), "prompt": f"visitor {k}"} for k in range(40)]


def reply(prompt: str, seed: int) -> str:
    """An explorer who clicks, and now and then goes back; a labeler who names the page that was reached, and
    finds sense in goods and in whole departments.
    """
    if prompt.startswith("You are"):
        chance = random.Random(seed)
        page, names = re.findall(r"Page: (.*)\nLinks: (.*)", prompt)[-1]
        if names == "none" or (page != HOME and chance.random() < 0.3):
            return "enough of this\nback"
        return f"a look\nclick {chance.choice(names.split(', '))}"
    if prompt.startswith("Before:"):
        return re.findall(r"Page: (.*)", prompt)[-1]
    if prompt.startswith("These changes"):
        return f"Find the {prompt.split(':', 1)[1].split('Write')[0].strip().splitlines()[-1]}."
    if "How well" in prompt:
        changes = prompt.partition("What was done:\n")[2].partition("\n\n")[0].split("\n")
        straight = len(changes) == len(set(changes)) and HOME not in changes
        return "Score: 5" if straight else "Score: 2"
    return "It is on the way."


def run(rows=PERSONAS, **settings):
    roles = nobody()
    roles.stage_metrics = {}
    settings = {"environment": "site", "every": 1, "max_turns": 6, "writer": Scripted(reply), **settings}
    return list(build("stage", {"name": "nnetnav", **settings})(rows, roles)), roles


def test_only_prefixes_with_a_good_score_are_demonstrations():
    out, roles = run()
    assert out and "is below the threshold" in roles.sentences[-1]
    steps: dict[tuple, list] = {}
    for row in out:
        persona, place, number = row["id"].rsplit("/", 2)
        steps.setdefault((persona, place), []).append(row)
        assert row["completions"][0].startswith("It is on the way.\n")
    for demonstration in steps.values():
        pages = [re.findall(r"Page: (.*)", row["prompt"])[-1] for row in demonstration]
        assert len(pages) == len(set(pages)), "a prefix that went back has a low score"
        assert demonstration[0]["instruction"] == f"Find the {pages[-1]}."
        assert demonstration[-1]["completions"][0].endswith("\nstop")
        first, last = demonstration[0]["prompt"], demonstration[-1]["prompt"]
        assert last.startswith(first + demonstration[0]["completions"][0] + "\n")
    deepest = max(len(demonstration) for demonstration in steps.values())
    assert deepest == 4, "three clicks and a stop"


def test_pruning_saves_steps():
    pruned, roles = run()
    whole, other = run(prune=False)
    assert roles.stage_metrics["nnetnav_steps"] < 0.7 * other.stage_metrics["nnetnav_steps"]
    assert [row["id"] for row in pruned] == [row["id"] for row in whole], "at an equal yield"


def test_who_labels_may_be_another_and_stops_may_have_answers():
    labeler = Scripted(lambda prompt, seed: "42\n" if prompt.endswith("wanted.") else reply(prompt, seed))
    explorer = Scripted(reply)
    out, _ = run(PERSONAS[:5], writer=explorer, labeler=labeler, stop="stop [{answer}]", rethink=False)
    assert all(prompt.startswith("You are") for prompt in explorer.prompts)
    assert not any(prompt.startswith("You are") for prompt in labeler.prompts)
    assert any(row["completions"] == ["stop [42]"] for row in out)
    assert not any("a look" in row["completions"][0] for row in out), (
        "thoughts of the exploration are left out"
    )
    chat = [{"id": "c", "prompt": [{"role": "user", "content": "visitor"}]}]
    turns, _ = run(chat, rethink=False)
    assert all(row["prompt"][0]["role"] == "user" for row in turns)
