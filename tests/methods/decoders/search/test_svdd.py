"""svdd: one proposal is plain sampling, many approach the tilted distribution."""

from __future__ import annotations

import pytest

from helpers.decoding import By, enumerate_texts, table_roles, tilted, variation
from luthier.methods.decoders.search.svdd import SVDD

MOST = 2


def table(text):
    return [0.0, 0.5, 0.5] if not text else [0.2, 0.5, 0.3]


def score(text: str) -> float:
    return {"ab": 1.0, "bb": -1.0}.get(text, 0.0)


def write(decoder, n: int = 1, seed: int = 0, most: int = MOST):
    how = {"seeds": [seed], "max_new_tokens": most, "stop": [0], "temperature": 1.0, "n": n}
    (texts,) = decoder.generate(table_roles(table), [{"prompt": ""}], [[]], **how)
    return texts


def test_one_proposal_is_plain_sampling():
    for seed in range(20):
        decoder = SVDD(reward=By(score), proposals=1, chunk=2)
        how = {"seeds": [seed], "max_new_tokens": 7, "stop": [0], "temperature": 1.0}
        plain = table_roles(table).policy.generate([[]], **how)
        assert write(decoder, seed=seed, most=7) == plain[0]


@pytest.mark.long
def test_samples_approach_the_tilted_distribution():
    """With whole texts as chunks the value is exact, and many proposals are an importance sample."""
    decoder = SVDD(reward=By(score), proposals=32, chunk=MOST, alpha=1.0)
    words = table_roles(table).renderer.answer
    expected = tilted(enumerate_texts(table, MOST), lambda text: score(words(text)))
    assert variation(write(decoder, n=400), expected) < 0.08
    assert variation(write(decoder, n=400), enumerate_texts(table, MOST)) > 0.1


def test_alpha_zero_takes_the_best():
    decoder = SVDD(reward=By(score), proposals=64, chunk=MOST)
    assert write(decoder, n=5) == [[1, 2]] * 5


def test_reward_grows_with_proposals():
    words = table_roles(table).renderer.answer
    means = []
    for proposals in (1, 2, 8):
        texts = write(SVDD(reward=By(score), proposals=proposals, chunk=1), n=150)
        means.append(sum(score(words(text)) for text in texts) / len(texts))
    assert means == sorted(means) and means[2] > means[0] + 0.2
