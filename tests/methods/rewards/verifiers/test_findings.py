"""findings: shares of statements."""

from __future__ import annotations

import pytest

from luthier.errors import RecipeError
from luthier.registry import build

REFERENCE = "No effusion. The heart is enlarged; lungs are clear"


@pytest.mark.parametrize(
    "text, score",
    [
        (REFERENCE, 1.0),
        ("Lungs are clear.\nno effusion;\n\nthe HEART is enlarged.", 1.0),
        ("No effusion.", 1 / 3),
        ("Effusion. The heart is enlarged. Lungs are clear.", 2 / 4),
        ("", 0.0),
        ("a fracture", 0.0),
    ],
)
def test_shares_of_statements(text, score):
    assert build("reward", "findings").scores({"answer": REFERENCE}, [text]) == [pytest.approx(score)]


def test_a_broken_expression_is_refused():
    with pytest.raises(RecipeError, match="divide"):
        build("reward", {"name": "findings", "divide": "("})
