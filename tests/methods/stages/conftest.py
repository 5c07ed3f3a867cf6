"""Fixtures of stages."""

from __future__ import annotations

import pytest

from helpers.stages import make_roles


@pytest.fixture(scope="module")
def tiny_roles(tiny):
    """Roles of the tiny model with itself, untuned, as the reference."""
    return make_roles(tiny)


@pytest.fixture
def sentences(tiny_roles) -> list[str]:
    """What a stage warns of."""
    warnings = []
    tiny_roles.warn, tiny_roles.clock.step = warnings.append, 0
    return warnings


@pytest.fixture
def roles(tiny_roles, sentences):
    return tiny_roles
