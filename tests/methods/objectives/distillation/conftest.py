"""Fixtures of methods/objectives/distillation."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow
