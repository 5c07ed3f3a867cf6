"""What was lost, in a sentence that says no more than the intervals do."""

from __future__ import annotations

import pytest

from luthier.methods.evaluators._base import paired_change
from luthier.report.retention import Skill, sentence, table


def skill(name: str, before: float, after: float, half: float, metric: str = "retention_accuracy") -> Skill:
    gap = after - before
    return Skill(name, metric, 40, before, after, gap, gap - half, gap + half)


def test_the_sentence_names_what_the_intervals_support():
    skills = [
        skill("arithmetic", 0.6, 0.4, 0.1),
        skill("general questions", 0.9, 0.88, 0.05),
        skill("refusing unsafe requests", 0.05, 0.05, 0.1),
        skill("plain text", 3.0, 3.5, 0.2, "retention_loss"),
    ]
    text = sentence(skills)
    assert text == (
        "What was lost: arithmetic 60.0% → 40.0% (−20.0 points, interval −30.0 to −10.0); plain text (loss)"
        " 3.00 → 3.50 (+0.50, interval +0.30 to +0.70). No change beyond chance: general questions, refusing"
        " unsafe requests. Below 10% before training, so with little to lose: refusing unsafe requests."
    )
    assert sentence(skills[1:2]) == "What was lost: nothing that these rows can tell."
    assert "Better: arithmetic." in sentence([skill("arithmetic", 0.4, 0.7, 0.1)])
    assert sentence([]) == ""
    assert table(skills)["rows"][0] == (
        "arithmetic",
        "40",
        "60.0%",
        "40.0%",
        "−20.0 points",
        "−30.0 to −10.0",
    )


def test_a_change_of_right_and_wrong_has_the_interval_of_bonett_and_price():
    before = {str(i): float(i < 30) for i in range(40)}
    after = {str(i): float(4 <= i < 31) for i in range(40)}  # four lost, one gained
    change = paired_change(before, after)
    gained, lost = 2 / 42, 5 / 42
    half = 1.959964 * ((gained + lost - (gained - lost) ** 2) / 42) ** 0.5
    assert change == pytest.approx((0.75, 0.675, -0.075, gained - lost - half, gained - lost + half))
    same = paired_change(before, before)
    assert same.difference == 0 and same.low < -0.05 and same.high == pytest.approx(-same.low)


def test_a_change_of_other_values_has_students_interval():
    from scipy.stats import ttest_rel

    before = dict(zip("abcde", (1.0, 2.0, 3.0, 4.0, 5.5)))
    after = dict(zip("abcde", (1.5, 2.1, 3.7, 4.0, 6.0)))
    interval = ttest_rel([*after.values()], [*before.values()]).confidence_interval()
    assert paired_change(before, after)[3:] == pytest.approx((interval.low, interval.high))
    with pytest.raises(ValueError, match="not the same"):
        paired_change(before, {"a": 1.0})
