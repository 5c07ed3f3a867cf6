"""iterative_deepening: where the sentence is put in, and what it does to a model that corrects itself."""

from __future__ import annotations

from helpers.decoding import By, table_roles
from luthier.methods.decoders.search.best_of_n import BestOfN
from luthier.methods.decoders.search.iterative_deepening import IterativeDeepening

LONG = {"seeds": [0], "max_new_tokens": 40, "stop": [0], "temperature": 1.0}


def rambling(text):
    return [0.0, 0.5, 0.5, 0.0]


def test_where_the_sentence_is_put_in():
    decoder = IterativeDeepening(budget=4, growth=2, trigger="cc", most=3)
    assert decoder.boundaries() == [4, 12, 28]
    roles = table_roles(rambling)
    ((text,),) = decoder.generate(roles, [{}], [[]], **LONG)
    places = [i for i, token in enumerate(text) if token == 3]
    assert places == [4, 5, 14, 15, 32, 33]


def test_without_a_sentence_it_is_plain_sampling():
    roles = table_roles(rambling)
    decoder = IterativeDeepening(budget=4, growth=2, trigger="")
    assert decoder.generate(roles, [{}], [[]], **LONG) == roles.policy.generate([[]], **LONG)


def correcting(text):
    """a is right, b is wrong, c asks for a check, after which nine of ten answers are right."""
    if not text:
        return [0.0, 0.4, 0.6, 0.0]
    if text[-1] == 3:
        return [0.0, 0.9, 0.1, 0.0]
    return [1.0, 0.0, 0.0, 0.0] if 3 in text else [0.0, 0.5, 0.5, 0.0]


def test_a_model_that_corrects_itself():
    """From 0.4 to 0.9; with a vote over five to 0.99."""
    roles = table_roles(correcting)
    decoder = {"name": "iterative_deepening", "budget": 1, "growth": 1, "trigger": "c", "most": 1}
    how = {"max_new_tokens": 4, "stop": [0], "temperature": 1.0}
    rows, prompts, seeds = [{}] * 200, [[]] * 200, list(range(200))
    one = BestOfN(samples=1, decoder=decoder, reward=By(len))
    right = [text[-2] == 1 for (text,) in one.generate(roles, rows, prompts, seeds=seeds, **how)]
    assert abs(sum(right) / len(right) - 0.9) < 0.06
