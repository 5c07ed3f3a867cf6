"""bitfit: bitfit."""

from __future__ import annotations

import pytest

from helpers.tuners import base, put
from luthier.errors import RecipeError


def test_bitfit():
    with pytest.raises(RecipeError, match="has no biases"):
        put("bitfit")
    assert all("norm" in k for k in put("bitfit", also=["norms"]).parameters())
    assert all(k.removesuffix(".weight").endswith("bias") for k in put("bitfit", base("gpt2")).parameters())
    with pytest.raises(RecipeError, match="shares its weight"):
        put("bitfit", base("gpt2"), also=["head"])
