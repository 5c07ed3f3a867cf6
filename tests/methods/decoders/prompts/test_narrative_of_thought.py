"""narrative_of_thought: a gold graph is read back, only edges between declared events stay."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from helpers.models import make_tokenizer
from luthier.methods.decoders.prompts.narrative_of_thought import (
    NarrativeOfThought,
    consistency,
    edges_in,
    edit_distance,
    f1,
)

EVENTS = ["boil water", "pour tea", "drink"]
GOLD = [("event0", "event1"), ("event1", "event2")]
EXAMPLE = {"goal": "bake", "events": ["mix", "bake"], "narrative": "First mix.", "edges": [[0, 1]]}


@pytest.mark.parametrize("mode", ["narrative", "steps", "code", "plain"])
def test_a_gold_graph_is_read_back(mode):
    decoder = NarrativeOfThought(mode=mode, examples=[EXAMPLE])
    text = decoder.relations(GOLD) + "\n    def get_more(self):\n        event2 -> event0\n"
    edges = edges_in(text.split("\n", 1)[1], ["event0", "event1", "event2"])
    assert f1(edges, GOLD) == 1.0 and edit_distance(edges, GOLD) == 0
    assert "event0 -> event1" in decoder.opening()
    assert ("First mix." in decoder.opening()) == (mode in ("narrative", "steps"))
    header = decoder.header("make tea", EVENTS)
    assert all(event in header for event in EVENTS) and ("class Scenario" in header) == (mode != "plain")


def scripted(*replies: str):
    """Roles whose policy writes these texts, one a call."""
    tokenizer, texts, prompts = make_tokenizer(), iter(replies), []

    def generate(ids, **how):
        prompts.append(tokenizer.decode(ids[0]))
        return [[tokenizer.encode(next(texts))] for _ in range(how.get("n", 1)) for _ in ids]

    read = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    renderer = SimpleNamespace(tokenizer=tokenizer, answer=read, text=read)
    return SimpleNamespace(policy=SimpleNamespace(generate=generate), renderer=renderer, prompts=prompts)


def test_only_edges_between_declared_events_stay():
    """Two of three edges are right, and one of two gold ones is among them: F1 is 2 / (2 + 2)."""
    reply = "event0 -> event1\nevent0 -> event9\nevent1 -> event1\nevent0 -> event2\nevent0->event1"
    roles = scripted("Water boils, tea is poured, and drunk.\n\nmore", reply)
    row = {"prompt": "make tea", "events": EVENTS}
    ((ids,),) = NarrativeOfThought().generate(roles, [row], [[]], stop=[1], n=1)
    edges = edges_in(roles.renderer.text(ids), ["event0", "event1", "event2"])
    assert edges == [("event0", "event1"), ("event0", "event2")] and ids[-1] == 1
    assert f1(edges, GOLD) == pytest.approx(0.5) and edit_distance(edges, GOLD) == 2
    assert (
        roles.prompts[0].rstrip().endswith("#")
        and "Water boils, tea is poured, and drunk." in roles.prompts[1]
    )
    assert "more" not in roles.prompts[1] and roles.prompts[1].endswith("def get_relations(self):\n")
    assert f1([], []) == 1.0 and consistency([GOLD, GOLD[:1]]) == pytest.approx(2 / 3)
