"""For folders of many runs: there `tiny` has two layers (imported by their conftest.py)."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    """The folder of the tiny Llama with two layers and its tokenizer."""
    return shallow
