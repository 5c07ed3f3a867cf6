"""Every decoder writes with a real model, the same text for the same seed, within the tokens allowed."""

from __future__ import annotations

import pytest

import luthier
from luthier.registry import find, names


@pytest.fixture(scope="module")
def loaded():
    return luthier.load("toy:lm", dtype="float32")


@pytest.mark.parametrize("name", names("decoder"))
def test_writes(loaded, name):
    how = {"max_new_tokens": 5, "seed": 3, "temperature": 1.0}
    decoder = {"name": name, **find("decoder", name).example}
    answers = loaded.generate(["The cat", "A dog"], decoder=decoder, **how)
    assert answers == loaded.generate(["The cat", "A dog"], decoder=decoder, **how)
    for answer in answers:
        assert len(loaded.tokenizer.encode(answer, add_special_tokens=False)) <= 6
