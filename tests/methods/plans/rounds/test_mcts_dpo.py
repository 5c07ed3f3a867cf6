"""mcts_dpo: rounds search with the policy as it is, against the reference of the start."""

from __future__ import annotations

from helpers.plans import played, report

RIGHT = {"name": "regex", "pattern": "right"}


def test_rounds_search_with_the_policy_as_it_is(recipe):
    plan = {"name": "mcts_dpo", "rounds": 2, "reward": RIGHT, "depth": 4, "judged": 8, "beta": 0.3}
    asked, _ = played(plan, recipe, [report("one"), report("two")])
    first, second = (request.stages[1] for request in asked)
    assert first["name"] == "mcts_pairs" and (first["draw"], second["draw"]) == (0, 1)
    assert asked[1].init_from == "one" and asked[1].roles["reference"] == "base"
    assert asked[0].evaluate[-1]["max_new_tokens"] == 64 * 4
    assert asked[1].objective == {"name": "mcts_dpo", "beta": 0.3}
