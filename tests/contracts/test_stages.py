"""Stages: the columns that each requires, provides and removes, and their settings."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

import luthier
from helpers.stages import rows_with
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.recipe.capabilities import columns_of
from luthier.registry import build, declared_words, find, helps, names, provides_of, requires_of

STAGES = names("stage")


COLUMNS = {*declared_words("Column"), "pairs"}  # what rows bring


@pytest.fixture(scope="session")
def tiny(four_layers) -> str:
    """Two layers find no row of these hard (ifd)."""
    return four_layers


def small(name: str):
    """A stage with settings that make it quick."""
    return build("stage", {"name": name, **find("stage", name).example})


@pytest.mark.parametrize("name", STAGES)
def test_stages_give_what_they_say_and_leave_their_rows_alone(name, roles):
    stage = small(name)
    if "gives" in stage.contract:
        pytest.skip(stage.contract["gives"])
    rows = rows_with(requires_of(stage) & COLUMNS)
    kept = copy.deepcopy(rows)
    out = list(stage(rows, roles))
    assert out and rows == kept
    assert provides_of(stage) & COLUMNS <= columns_of(out) and not (
        stage.removes - provides_of(stage) - {"pairs"}
    ) & columns_of(out)
    assert all("id" in r and "prompt" in r for r in out)


@pytest.mark.parametrize("name", STAGES)
def test_stages_need_what_they_want(name, roles):
    stage = small(name)
    wanted = requires_of(stage) & COLUMNS
    for word in wanted - {"pairs"}:
        rows = [{k: v for k, v in r.items() if k != word} for r in rows_with(wanted)]
        try:
            assert not list(stage(rows, roles))  # such rows are dropped, or are refused
        except (RecipeError, KeyError):
            pass


@pytest.mark.parametrize("name", STAGES)
def test_stages_without_a_model_need_none(name):
    stage = small(name)
    if not stage.asks_model:
        nobody = SimpleNamespace(clock=Clock(), warn=lambda sentence: None)
        assert list(stage(rows_with(requires_of(stage) & COLUMNS), nobody))


@pytest.mark.parametrize("name", STAGES)
def test_every_setting_is_explained(name):
    assert all(helps(find("stage", name)).values())


def test_rows_that_leave_are_told_in_the_report(base, tmp_path):
    rows = [{"prompt": f"{a}", "answer": f"{a}", "completion": f"{a}"} for a in range(16)]
    change = {"data": rows, "stages": [{"name": "ifd", "share": 0.5}], "max_steps": 1}
    try:
        notes = luthier.tune(base | change, folder=tmp_path).notes
    except RecipeError as error:
        pytest.skip(str(error))
    assert any("stage 'ifd'" in n and "rows are dropped" in n for n in notes)
