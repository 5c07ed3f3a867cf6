"""best_of_n: the best by reward, by vote and by weighted vote."""

from __future__ import annotations

from helpers.decoding import By, table_roles
from luthier.methods.decoders.search.best_of_n import BestOfN

WORDS = ".123"


def table(text):
    return [0.0, 0.5, 0.3, 0.2] if not text else [1.0, 0.0, 0.0, 0.0]


def chosen(**settings) -> str:
    roles = table_roles(table, WORDS)
    decoder = BestOfN(samples=40, **settings)
    ((text,),) = decoder.generate(roles, [{}], [[]], seeds=[0], max_new_tokens=2, stop=[0], temperature=0.0)
    return roles.renderer.answer(text)


def test_by_reward_by_vote_and_by_both():
    assert chosen(reward=By(lambda text: text == "3")) == "3"
    assert chosen(by="vote") == "1"
    assert chosen(by="weighted_vote", reward=By(lambda text: 5.0 * (text == "3") + 0.01)) == "3"


def test_one_sample_is_sampling():
    roles = table_roles(table, WORDS)
    how = {"seeds": [4, 5], "max_new_tokens": 2, "stop": [0], "temperature": 1.0}
    plain = roles.policy.generate([[], []], **how)
    assert BestOfN(samples=1, reward=By(len)).generate(roles, [{}, {}], [[], []], **how) == plain


def test_only_the_largest_clusters_are_re_ranked():
    """Of ten samples five say 1, three 2 and two 3; the verifier likes 3, and 2 over 1."""
    roles = table_roles(table, WORDS)
    texts = [[1], [2], [3], [1], [2], [1], [3], [1], [2], [1]]
    seen = []

    def likes(text: str) -> float:
        seen.append(text)
        return {"1": 0.1, "2": 0.5, "3": 9.0}[text]

    def best(**settings) -> str:
        decoder = BestOfN(reward=By(likes), **settings)
        return roles.renderer.answer(decoder.best(roles, {}, texts))

    assert best(by="weighted_vote", clusters=1) == best(by="vote") == "1"
    assert set(seen) == {"1"}, "a verifier reads no text of other clusters"
    assert best(by="weighted_vote", clusters=2) == "2", "1.5 of three to 0.5 of five"
    assert best(by="weighted_vote", clusters=3) == best(by="weighted_vote") == "3"
