"""qalign: frequencies of the chain are the tilted distribution of an enumerable model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from helpers.decoding import By, enumerate_texts, table_roles, tilted, variation
from luthier.methods.decoders.search.qalign import QAlign

MOST = 3


def table(text):
    return [0.3, 0.5, 0.2] if len(text) % 2 else [0.2, 0.3, 0.5]


def score(text: str) -> float:
    return 1.5 * text.count("b") - 0.5 * text.count("a")


def chains(decoder, steps: int = 60, n: int = 300, **how):
    """The late states of many chains."""
    roles = table_roles(table)
    how = {"seeds": [3], "max_new_tokens": MOST, "stop": [0], "temperature": 1.0, "n": n}
    states = replace(decoder, steps=steps).chains(roles, [{"prompt": ""}], [[]], **how)
    return [state for chain in states for state in chain[20:]]


def expected(beta: float) -> dict:
    words = table_roles(table).renderer.answer
    return tilted(enumerate_texts(table, MOST), lambda text: score(words(text)) / beta)


@pytest.mark.long
def test_frequencies_are_the_tilted_distribution():
    """12,300 states of 300 chains."""
    assert variation(chains(QAlign(reward=By(score), beta=1.0)), expected(1.0)) < 0.03
    assert variation(chains(QAlign(reward=By(lambda text: 2.0))), enumerate_texts(table, MOST)) < 0.03


@pytest.mark.long
def test_without_the_ratio_of_lengths_it_is_another():
    class Unequal(QAlign):
        def acceptance(self, before, after, length, new_length):
            return super().acceptance(before, after, 1, 1)

    assert variation(chains(Unequal(reward=By(lambda text: 2.0))), enumerate_texts(table, MOST)) > 0.05


def test_large_beta_accepts_by_lengths():
    decoder = QAlign(reward=By(score), beta=1e9)
    assert decoder.acceptance(0.0, 5.0, 2, 4) == pytest.approx(0.5)
    assert decoder.acceptance(5.0, 0.0, 4, 2) == 1.0
    assert QAlign(reward=By(score), beta=2.0).acceptance(1.0, 0.0, 3, 3) == pytest.approx(math.exp(-0.5))


def test_the_vote_is_where_the_chain_stood_most():
    decoder = QAlign(answer="vote", burn_in=0.5)
    assert decoder.choose([[1], [1], [1], [2], [2], [3]]) == [2]
    assert QAlign().choose([[1], [2]]) == [2]
