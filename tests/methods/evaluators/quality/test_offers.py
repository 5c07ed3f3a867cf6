"""offers: twelve steps by hand, and what counts as silence."""

from __future__ import annotations

import pytest

from luthier.methods.evaluators.quality.offers import Offers, rates


def test_twelve_steps_by_hand():
    right_help, useless = (True, True, True), (True, True, False)
    missed, alarm, silence = (True, False, False), (False, True, True), (False, False, False)
    steps = [right_help] * 4 + [useless] + [missed] * 2 + [alarm] * 2 + [silence] * 3
    assert rates(steps) == {
        "offer_recall": pytest.approx(4 / 7),
        "offer_precision": pytest.approx(4 / 7),
        "false_alarms": pytest.approx(2 / 5),
        "offer_accuracy": pytest.approx(7 / 12),
        "offer_f1": pytest.approx(4 / 7),
    }
    always = rates([right_help] * 3 + [alarm] * 9)
    assert always["offer_recall"] == 1.0 and always["offer_precision"] == 0.25 and always["offer_f1"] == 0.4
    assert always["false_alarms"] == 1.0
    never = rates([missed] * 3 + [silence] * 9)
    assert never["offer_f1"] == 0.0 and never["offer_accuracy"] == 0.75


def test_what_is_silence():
    evaluator = Offers()
    assert not any(evaluator.speaks(text) for text in ("", " none", "None\n"))
    assert evaluator.speaks(" fix it") and evaluator.speaks("none of these")
    assert Offers(silence="-").speaks("none")
