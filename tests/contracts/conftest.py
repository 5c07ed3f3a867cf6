"""For files of many runs two layers are enough."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    """The folder of the tiny Llama with two layers and its tokenizer."""
    return shallow
