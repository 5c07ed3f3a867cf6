"""rain: what a judge refuses is not written; visits, priors and votes."""

from __future__ import annotations

import pytest

from helpers.decoding import By
from luthier.clock import Clock
from luthier.methods.decoders.search.rain import RAIN, Segment, Walk

PROMPT = [20, 21, 22]
HOW = {"seeds": [0], "max_new_tokens": 4, "stop": [1]}
SMALL = {"candidates": 4, "lookahead": 0, "turns": 12, "visits": 3}


def walk(roles, decoder, most: int = 4) -> Walk:
    return Walk(decoder, roles, {"prompt": ""}, PROMPT, [1], most, Clock(0))


def test_no_bad_token_is_written(tiny_roles):
    ((plain,),) = tiny_roles.policy.generate([PROMPT], temperature=0.0, **HOW)
    bad = tiny_roles.renderer.answer(plain[:1])
    decoder = RAIN(reward=By(lambda text: -1.0 if bad in text else 1.0), **SMALL)
    ((text,),) = decoder.generate(tiny_roles, [{"prompt": ""}], [PROMPT], **HOW)
    assert bad not in tiny_roles.renderer.answer(text) and bad in tiny_roles.renderer.answer(plain)


def test_a_judge_with_a_favourite_letter_says_zero(tiny_roles, monkeypatch):
    monkeypatch.setattr(RAIN, "letter", lambda self, roles, row, answer, first, second: "A")
    assert RAIN().judge(tiny_roles, {"prompt": ""}, [23]) == 0.0
    monkeypatch.setattr(RAIN, "letter", lambda self, roles, row, answer, first, second: first)
    assert RAIN().judge(tiny_roles, {"prompt": ""}, [23]) == 1.0


def test_the_policy_chooses_one_of_two_letters(tiny_roles):
    letters = {RAIN().letter(tiny_roles, {"prompt": "hi"}, [23], *pair) for pair in (("A", "B"), ("B", "A"))}
    assert letters <= {"A", "B"}


def test_visits_are_the_turns(tiny_roles):
    search = walk(tiny_roles, RAIN(reward=By(lambda text: 0.0), **{**SMALL, "shared": 0.0, "turns": 9}))
    root = Segment([])
    search.commit(root, [])
    assert root.visits == search.searched == 9
    assert sum(child.visits for child in root.children) == 9


def test_a_judge_of_one_mind_leaves_the_prior(tiny_roles):
    """All values alike: the likeliest segment is visited most and committed."""
    search = walk(tiny_roles, RAIN(reward=By(lambda text: 0.5), **SMALL))
    root = Segment([])
    chosen = search.commit(root, [])
    assert chosen.prior == max(child.prior for child in root.children)


def test_values_are_lent_to_similar_siblings(tiny_roles):
    search = walk(tiny_roles, RAIN(reward=By(len), similarity=-1.0, shared=0.5))
    root = Segment([])
    root.children = [Segment([23], root), Segment([24], root)]
    search.back_up(root.children[0], 1.0)
    one, other = root.children
    assert (one.visits, other.visits, root.visits) == (1, 0, 1)
    cosine = search.embedding(one) @ search.embedding(other)
    assert other.weight == pytest.approx(
        0.5 * float(cosine / search.embedding(one).norm() / search.embedding(other).norm()), abs=1e-5
    )
