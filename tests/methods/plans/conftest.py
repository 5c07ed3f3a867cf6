"""Fixtures of methods/plans."""

from __future__ import annotations

import pytest

from luthier.recipe.recipe import Recipe


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


@pytest.fixture
def recipe(tiny):
    return Recipe.load({"model": tiny, "tuner": "lora"})
