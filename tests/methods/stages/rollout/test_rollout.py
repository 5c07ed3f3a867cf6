"""rollout: rollouts do not depend on company or history; rollouts end with their stop token or say that they
were cut; old is what the policy says; greedy rollouts agree and settings are heard.
"""

from __future__ import annotations

import pytest

from helpers.stages import rollout, rows_with
from luthier.methods.stages._base import completion_logprobs
from luthier.registry import provides_of


def test_rollouts_do_not_depend_on_company_or_history(roles):
    rows = rows_with(set(), 7)
    whole = {r["id"]: r["completions"] for r in rollout()(rows, roles)}
    alone = {
        r["id"]: r["completions"] for some in (rows[4:], rows[:1], rows[1:4]) for r in rollout()(some, roles)
    }
    assert whole == alone
    roles.clock.step = 1
    later = {r["id"]: r["completions"] for r in rollout()(rows, roles)}
    roles.clock.step = 0
    other = {r["id"]: r["completions"] for r in rollout(draw=1)(rows, roles)}
    assert all(whole[k] != later[k] and whole[k] != other[k] for k in whole)
    twice = [r["completions"] for r in rollout()([rows[0], rows[0]], roles)]
    assert twice[0] == whole["r0"] != twice[1]


@pytest.mark.long
def test_rollouts_end_with_their_stop_token_or_say_that_they_were_cut(roles, sentences):
    stop = roles.renderer.stop_ids
    out = rollout(n=16, max_new_tokens=40)(rows_with(set(), 8), roles)
    for row in out:
        for ids, cut in zip(row["completions"], row["truncated"], strict=True):
            assert (
                not any(t in stop for t in ids[:-1])
                and cut == (ids[-1] not in stop)
                and (not cut or len(ids) == 40)
            )
    cuts = sum(sum(r["truncated"]) for r in out)
    assert 0 < cuts < 128 and sentences == [
        f"stage 'rollout': {cuts} of 128 completions did not reach a stop token within 40 tokens"
    ]
    roles.clock.step = 5
    rollout()(rows_with(set()), roles)
    assert len(sentences) == 1  # a live stage says it once


def test_old_is_what_the_policy_says(roles):
    rows = rollout(old=True, batch_size=2)(rows_with(set()), roles)
    roles.policy.train()
    again = list(completion_logprobs(roles.policy, roles, rows, 6))
    roles.policy.eval()
    for row, values in zip(rows, again, strict=True):
        assert [len(v) for v in row["old_logprobs"]] == [len(c) for c in row["completions"]]
        assert row["old_logprobs"][0] == pytest.approx(values[0], abs=1e-5)
    assert (
        "old_logprobs" not in rollout()(rows_with(set()), roles)[0]
        and "old_logprobs" not in provides_of(rollout())
        and "old_logprobs" in provides_of(rollout(old=True))
    )


def test_greedy_rollouts_agree_and_settings_are_heard(roles):
    rows = rows_with(set(), 3)
    greedy = rollout(temperature=0.0)(rows, roles)
    assert all(r["completions"][0] == r["completions"][1] == r["completions"][2] for r in greedy)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert [r["completions"] for r in rollout(**narrow)(rows, roles)] == [
            r["completions"] for r in greedy
        ]


def test_what_was_known_of_earlier_completions_leaves(roles):
    rows = [
        {**r, "cached_logprobs": [[0.0]], "old_logprobs": [[0.0]], "rewards": {"a": [1.0]}}
        for r in rows_with({"completions", "scores", "answer"})
    ]
    out = rollout()(rows, roles)
    assert (
        not {"scores", "cached_logprobs", "old_logprobs", "rewards"} & out[0].keys()
        and out[0]["answer"] == "0"
    )


def test_rollouts_stay_within_what_a_row_may_hold(roles, sentences, monkeypatch):
    rows = [
        {"id": "short", "prompt": "ab"},
        {"id": "long", "prompt": "x" * 12},
        {"id": "nothing", "prompt": ""},
    ]
    monkeypatch.setattr(roles.renderer, "max_length", 12)
    out = rollout(max_new_tokens=40)(rows, roles)
    assert [r["id"] for r in out] == ["short"] and all(len(c) <= 10 for c in out[0]["completions"])
    assert sentences[0].startswith(
        "stage 'rollout': 2 of 3 rows are dropped: the prompt has 12 tokens, which leaves none"
    )
