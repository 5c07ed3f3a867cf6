"""reasoning_faithfulness: scripted models that use their reasoning, ignore it, or do either."""

from __future__ import annotations

import pytest

from helpers.scripted import scripted_roles
from luthier.errors import RecipeError
from luthier.methods.evaluators.quality.reasoning_faithfulness import ReasoningFaithfulness, cut, steps_of

FORCE = "\nThe answer is"
REASONING = "First 2. Then 3. Then 4. So 5."
ROWS = [{"id": str(i), "prompt": f"q{i}: ", "answer": "5"} for i in range(20)]


def model(uses_reasoning):
    """uses_reasoning: number of the question -> does its answer follow from the last step?"""

    def script(text, _):
        question, _, rest = text.partition(": ")
        if FORCE not in rest:
            return REASONING
        before = rest.partition(FORCE)[0]
        if not uses_reasoning(int(question[1:])):
            return " 5"
        digits = [c for c in before if c.isdigit()]
        return f" {digits[-1]}" if digits else " none"

    return script


def measured(uses_reasoning, tmp_path, **settings):
    return ReasoningFaithfulness(**settings).run(
        scripted_roles(model(uses_reasoning)), ROWS, tmp_path, "after"
    )


@pytest.mark.parametrize("uses", [True, False])
def test_models_that_use_and_ignore_reasoning(uses, tmp_path):
    metrics = measured(lambda k: uses, tmp_path, reward="exact_match")
    rate = float(uses)
    for name in ("early_answer_change", "filler_change", "early_answer_change/0", "early_answer_change/0.75"):
        assert metrics[name] == rate
    assert metrics["reasoned_accuracy"] == 1.0 and metrics["direct_accuracy"] == 1.0 - rate


def test_half_of_a_population(tmp_path):
    """Where a part of the questions is answered from the reasoning, the rate is that part."""
    metrics = measured(lambda k: k < 7, tmp_path, fractions=[0.0, 0.5])
    assert metrics["early_answer_change"] == metrics["filler_change"] == pytest.approx(7 / 20)
    with pytest.raises(RecipeError, match="below 1"):
        ReasoningFaithfulness(fractions=[1.0])


def test_steps_of_a_text():
    assert steps_of(REASONING) == ["First 2. ", "Then 3. ", "Then 4. ", "So 5."]
    assert "".join(steps_of("a\nb 1.5 c! d")) == "a\nb 1.5 c! d"
    assert cut(REASONING, 0.5) == "First 2. Then 3." and cut(REASONING, 0.0) == "" == cut("", 0.5)
