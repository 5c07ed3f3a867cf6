"""transfer_q_star: values by rollouts on an enumerable model."""

from __future__ import annotations

import torch

from helpers.decoding import By, TablePolicy, enumerate_texts, table_roles
from luthier.clock import Clock
from luthier.methods.decoders.search.transfer_q_star import TransferQStar

MOST = 3
HOW = {"seeds": [0], "max_new_tokens": MOST, "stop": [0]}


def table(text):
    return [0.2, 0.7, 0.1]


def aligned(text):
    """Goes for b."""
    return [0.05, 0.05, 0.9]


def score(text: str) -> float:
    return float(text.count("b"))


def adjusted(decoder, who, text=()):
    roles = table_roles(table)
    adjust = decoder.adjuster(roles, who, {"prompt": ""}, 0, MOST, [0])
    return adjust(torch.tensor([table(text)]).log(), [[]], [list(text)])[0]


def test_greedy_values_reach_the_optimal_reward():
    """Rollouts of the aligned model lead to the best text; with the policy's own they are no better."""
    roles = table_roles(table)
    best = max(score(roles.renderer.answer(text)) for text in enumerate_texts(table, MOST))
    rewards = {}
    for name, who in (("aligned", TablePolicy(aligned)), ("policy", roles.policy)):
        decoder = TransferQStar(reward=By(score), k=3, alpha=1e-3)
        adjust = decoder.adjuster(roles, who, {"prompt": ""}, 0, MOST, [0])
        ((text,),) = roles.policy.generate([[]], decoder=adjust, temperature=0.0, **HOW)
        rewards[name] = score(roles.renderer.answer(text))
    assert rewards["aligned"] == best >= rewards["policy"]


def test_large_alpha_is_the_policy():
    logits = adjusted(TransferQStar(reward=By(score), k=3, alpha=1e6), TablePolicy(aligned))
    torch.testing.assert_close(logits.softmax(-1), torch.tensor(table(())), atol=1e-4, rtol=0)


def test_indirect_with_the_same_reward_is_direct():
    direct = TransferQStar(reward=By(score), k=2, rollouts=5)
    indirect = TransferQStar(reward=By(score), aligned_reward=By(score), k=2, rollouts=5)
    assert torch.equal(adjusted(direct, TablePolicy(aligned)), adjusted(indirect, TablePolicy(aligned)))


def test_indirect_weighs_by_what_the_aligned_model_was_not_tuned_for():
    roles = table_roles(table)
    decoder = TransferQStar(reward=By(score), aligned_reward=By(lambda text: 0.0), beta=0.5)
    value = decoder.value(roles, {"prompt": ""}, [[1, 0], [2, 0]])
    weights = torch.tensor([0.0, 2.0]).softmax(0)
    assert abs(value - float(weights[1])) < 1e-6


def test_only_the_likeliest_tokens_are_tried():
    logits = adjusted(TransferQStar(reward=By(score), k=2), TablePolicy(aligned))
    assert torch.isinf(logits).tolist() == [False, False, True]


def test_the_aligned_model_may_be_the_policy(roles_of_tables=None):
    roles = table_roles(table)
    decoder = TransferQStar(reward=By(score), k=3, alpha=1e-3, rollouts=4)
    (texts,) = decoder.generate(roles, [{"prompt": ""}], [[]], temperature=0.0, **HOW)
    assert score(roles.renderer.answer(texts[0])) >= 2
    values = decoder.values(roles, roles.policy, {}, [], [[1, 0]], Clock(0), MOST, [0])
    assert values == [0.0]
