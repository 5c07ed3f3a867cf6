"""code_bleu: one for the reference itself; renamed is nearer than otherwise computed."""

from __future__ import annotations

import pytest

from luthier.methods.rewards.verifiers.code_bleu import bleu, edges, subtrees
from luthier.registry import build
from luthier.sandbox.code import tree_of

REFERENCE = (
    "def f(a, b):\n    total = a + b\n    for i in range(b):\n        total = total * i\n    return total\n"
)
RENAMED = REFERENCE.replace("total", "x").replace("a", "p").replace("rpnge", "range")
OTHER = "def f(a, b):\n    return max(a, b)\n"


def scores(*texts):
    return build("reward", "code_bleu").scores({"answer": REFERENCE}, list(texts))


def test_renamed_is_nearer_than_otherwise_computed():
    same, renamed, other, broken, nothing = scores(REFERENCE, RENAMED, OTHER, REFERENCE + "(", "")
    assert same == pytest.approx(1.0)
    assert same > renamed > 0.5 > other > nothing == 0.0
    assert broken == pytest.approx(0.5, abs=0.05), "tokens alone"
    assert build("reward", "code_bleu").scores({"answer": [OTHER, REFERENCE]}, [REFERENCE]) == [
        pytest.approx(1.0)
    ]


def test_names_matter_neither_for_syntax_nor_for_flow():
    one, other = tree_of(REFERENCE), tree_of(RENAMED)
    assert subtrees(one) == subtrees(other) and edges(one) == edges(other)
    assert edges(one)["v0", "v1"] == 1 and edges(one)["return", "v0"] == 1
    assert edges(tree_of(OTHER)) != edges(one) and not edges(None)


@pytest.mark.filterwarnings("error")
def test_a_program_may_be_deep_or_odd():
    """Nested far deeper than Python calls functions, and escapes of which Python warns."""
    deep = "x = a" + ".b" * 900
    for program in (deep, "x = " + "+".join("a" * 900), "x = '\\d'", "x = " + "-" * 50_000 + "1"):
        reward = build("reward", "code_bleu")
        assert reward.scores({"answer": program}, [program]) in ([pytest.approx(1.0)], [pytest.approx(0.5)])
    assert subtrees(tree_of(deep)).total() > 900


def test_bleu_in_closed_form():
    ours, theirs = "if x : y".split(), "if x : z".split()
    # 3 of 4, (2 + 1) of (3 + 1), (1 + 1) of (2 + 1), (0 + 1) of (1 + 1)
    assert bleu(ours, theirs, even=True) == pytest.approx((3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # of single tokens `if` weighs 1 and each other 0.2
    assert bleu(ours, theirs, even=False) == pytest.approx((1.4 / 1.6 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
