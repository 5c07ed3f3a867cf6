"""learned_soup: shares descend to the minimum; a run alone is a soup, too."""

from __future__ import annotations

import pytest

from helpers.plans import report
from luthier.errors import RecipeError
from luthier.recipe.validate import validate
from luthier.registry import build

OF = [{"learning_rate": v} for v in (1e-4, 2e-4, 3e-4)]


def learned(recipe, singles, loss, **settings):
    """Play the plan: each average is answered with a loss of its shares."""
    play = build("plan", {"name": "learned_soup", "of": OF, **settings}).recipes(recipe)
    asked = next(play)
    answer = [measured(f"s{k}", value) for k, value in enumerate(singles)]
    try:
        while True:
            asked = play.send(answer)
            some = asked if isinstance(asked, list) else [asked]
            answers = []
            for one in some:
                shares = one.init_from["merge"]["weights"]
                assert one.objective is None and sum(shares) == pytest.approx(1)
                answers.append(measured(str(shares), loss(shares)))
            answer = answers if isinstance(asked, list) else answers[0]
    except StopIteration as end:
        return end.value


def measured(folder, loss):
    made = report(folder, loss=loss)
    made.stats = {}
    return made


def test_shares_descend_to_the_minimum(recipe):
    best = (0.6, 0.3, 0.1)

    def loss(shares):
        return 1 + sum((a - b) ** 2 for a, b in zip(shares, best, strict=True))

    end = learned(recipe, (2, 2, 2), loss, steps=12)
    even = loss([1 / 3] * 3)
    assert end.after["loss"] - 1 < 0.05 * (even - 1)
    assert [float(line["share"]) for line in end.stats["table"]] == pytest.approx(best, abs=0.08)


def test_one_run_alone_is_a_soup_too(recipe):
    """Where no average is as good as a run, that run is the answer, with a share of one."""
    end = learned(recipe, (0.9, 0.5, 0.8), lambda shares: 1.0)
    assert end.folder == "s1" and [line["share"] for line in end.stats["table"]] == [
        "0.000",
        "1.000",
        "0.000",
    ]


def test_runs_hold_out_the_same_rows(recipe):
    from helpers.plans import ROWS

    plan = {"name": "learned_soup", "of": [{"seed": 1}, {"seed": 2}]}
    with pytest.raises(RecipeError, match="plan 'learned_soup': with other seeds"):
        validate(recipe.but(plan=plan), ROWS)
