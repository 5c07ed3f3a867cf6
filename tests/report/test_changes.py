"""The check-up: the sentence, the dot plot and the conditions say what the intervals do."""

from __future__ import annotations

import random

import pytest

from luthier.errors import RecipeError
from luthier.methods.evaluators._base import keep
from luthier.report.changes import Condition, dot_plots, measured_changes, shown_changes, verdict
from luthier.report.html import environment
from luthier.report.retention import Skill, refusal_warning


def skill(name: str, before: float, after: float, half: float, metric: str = "retention_accuracy") -> Skill:
    gap = after - before
    return Skill(name, metric, 40, before, after, gap, gap - half, gap + half)


TASK = skill("sequence accuracy", 0.1, 0.5, 0.1, "accuracy")
SKILLS = [
    skill("arithmetic", 0.6, 0.4, 0.1),
    skill("general questions", 0.9, 0.88, 0.05),
    skill("plain text", 3.0, 3.5, 0.2, "retention_loss"),
]
RETAINED = skill("retention accuracy", 0.75, 0.64, 0.08)


def as_result(*changes: Skill, skills=SKILLS) -> dict:
    return {
        "base": {"metrics": {"answer_length": 20.0}},
        "tuned": {"metrics": {"answer_length": 25.0}},
        "changes": [vars(change) for change in changes],
        "skills": [vars(skill) for skill in skills],
    }


def test_the_sentence_names_gains_and_losses():
    text = verdict(shown_changes([TASK, RETAINED], SKILLS))
    assert text == (
        "Gained: sequence accuracy 10.0% → 50.0% (+40.0 points, interval +30.0 to +50.0). Lost: arithmetic"
        " 60.0% → 40.0% (−20.0 points, interval −30.0 to −10.0); plain text (loss) 3.00 → 3.50 (+0.50,"
        " interval +0.30 to +0.70). 1 of 4 measures show no change beyond chance."
    )
    assert verdict([]) == ""
    assert "Lost: nothing that these rows can tell." in verdict([TASK])


def test_dots_are_sorted_and_right_is_better():
    shares, others = dot_plots(shown_changes([TASK, RETAINED], SKILLS))
    labels = [dot["label"] for dot in shares["dots"]]
    assert labels == ["sequence accuracy", "general questions", "arithmetic"]
    assert [dot["kind"] for dot in shares["dots"]] == ["good", "soft", "bad"]
    best, _, worst = shares["dots"]
    assert worst["low"] < worst["at"] < worst["high"] < shares["zero"] < best["low"] < best["high"] <= 97
    (text,) = others["dots"]
    assert text["high"] < others["zero"] and text["kind"] == "bad" and text["text"] == "+0.50"
    template = environment().from_string('{% import "_macros.html.j2" as m %}{{ m.dots(plot) }}')
    page = template.render(plot=shares)
    assert page.count("<circle") == 3 and "−20.0" in page


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("retention < -2", True),
        ("retention < -12", False),
        ("retention.high < 0", True),
        ("arithmetic.after >= 40", True),
        ("general questions < -2.5", False),
        ("accuracy.before > 10.5%", False),
        ("answer_length > 4", True),
        ("elsewhere_accuracy < −2", True),
        ("plain text > 0.4", True),
    ],
)
def test_conditions(condition, holds):
    assert Condition.parse(condition).holds(as_result(TASK, RETAINED)) == holds


@pytest.mark.parametrize(
    "condition", ["retention", "retention = 3", "retention.middle < 1", "lost < 1", "a < b"]
)
def test_what_cannot_be_read_or_was_not_measured_is_refused(condition):
    with pytest.raises(RecipeError, match="--fail-if"):
        Condition.parse(condition).holds(as_result(TASK))


def test_a_warning_where_refusals_fell_beyond_chance():
    fell = skill("refusing unsafe requests", 0.9, 0.4, 0.2)
    assert "lowered refusals" in refusal_warning([*SKILLS, fell])
    assert "lowered refusals" in refusal_warning([skill("x", 0.9, 0.4, 0.2, "refused_unsafe")])
    assert refusal_warning([*SKILLS, skill("refusing unsafe requests", 0.9, 0.8, 0.2)]) == ""
    assert refusal_warning([skill("x", 0.9, 0.4, 0.2, "refused_safe")]) == ""


def test_fifty_pairs_of_models_with_and_without_a_loss(tmp_path):
    """A skill that falls from 80 to 40 % on 60 rows is named in at least 48 of 50 models, and one whose rows
    change at random in at most 6.
    """
    rng, found, false = random.Random(0), 0, 0
    for number in range(50):
        for after, folder in ((0.4, tmp_path / f"lost-{number}"), (0.8, tmp_path / f"same-{number}")):
            folder.mkdir()
            for when, share in (("before", 0.8), ("after", after)):
                keep(folder, when, accuracy={str(i): float(rng.random() < share) for i in range(60)})
        found += "Lost: sequence accuracy" in verdict(measured_changes(tmp_path / f"lost-{number}"))
        false += "Lost: sequence accuracy" in verdict(measured_changes(tmp_path / f"same-{number}"))
    assert found >= 48 and false <= 6
