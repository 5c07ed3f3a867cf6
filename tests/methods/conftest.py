"""Fixtures of methods."""

from __future__ import annotations

import pytest

from luthier.data.load import load_rows as load
from luthier.model.load import assemble
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import validate


@pytest.fixture(scope="module")
def roles(tiny):
    """Roles of a tiny model; everything moves."""
    recipe = Recipe.load({"model": tiny, "tuner": "full", "dtype": "float32"})
    return assemble(recipe, validate(recipe, load([{"prompt": "a", "completion": "b"}]).rows))
