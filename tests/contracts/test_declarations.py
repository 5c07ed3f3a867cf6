"""Declarations: every method of every kind, found by walking the folders, says what it is and refuses what it
is not.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest

from luthier.errors import RecipeError
from luthier.registry import KINDS, build, card, cards, find, helps, names, page, spec

EVERY = [(c.kind, c.name) for c in cards()]


@pytest.mark.parametrize("kind, name", EVERY, ids=lambda x: x)
def test_a_declaration_is_whole(kind, name):
    """Found, documented, its settings explained, its card read from the source equal to the class."""
    cls, said = find(kind, name), card(kind, name)
    assert cls.name == name and cls.kind == kind
    assert (said.paper, said.rows) == (cls.paper, cls.rows)
    assert (said.requires, said.provides, said.removes) == (cls.requires, cls.provides, cls.removes)
    assert said.summary and said.summary.endswith((".", ".)")) or ":" in said.summary, (
        f"{said.module}: the file opens with a sentence"
    )
    assert inspect.getdoc(cls), f"{said.module}: the class says what it does"
    for f in fields(cls):
        assert helps(cls).get(f.name), f"{said.module}: setting '{f.name}' has no trailing comment"
    if cls.paper:
        assert cls.paper.startswith(("arXiv:", "doi:", "https://")), cls.paper
    assert f"# {name}" in page(cls)


@pytest.mark.parametrize("kind, name", EVERY, ids=lambda x: x)
def test_a_method_speaks_in_its_own_name(kind, name):
    """What it inherits from another method or a family does not name that one in its messages."""
    for cls in find(kind, name).__mro__[1:]:
        if cls.__module__.startswith("luthier."):
            others = set(re.findall(rf"\b{kind} '(\w+)'", inspect.getsource(cls))) - {name}
            assert not others, f"{cls.__name__} names {kind} {others}, and {name} inherits it"


@pytest.mark.parametrize("kind, name", EVERY, ids=lambda x: x)
def test_an_unknown_setting_is_refused(kind, name):
    needed = {
        f.name: 1 for f in fields(find(kind, name)) if f.default is MISSING and f.default_factory is MISSING
    }
    with pytest.raises(RecipeError, match=f"{kind} '{name}' has no setting 'qqq'"):
        build(kind, {"name": name, "qqq": 1, **needed})


def test_every_kind_has_a_method():
    assert [k for k in KINDS if not names(k)] in ([], ["decoder"])


def test_defaults_survive_being_written_out():
    for kind, name in EVERY:
        if all(
            f.default is not MISSING or f.default_factory is not MISSING for f in fields(find(kind, name))
        ):
            try:
                made = build(kind, name)
            except RecipeError:  # a method whose defaults are not enough says so itself
                continue
            assert build(kind, spec(made)) == made


def test_did_you_mean():
    assert "did you mean 'lora'" in str(pytest.raises(RecipeError, build, "tuner", "loar").value)
    assert "did you mean 'learning" not in str(pytest.raises(RecipeError, build, "tuner", "zzzzzz").value)


def test_evaluators_declare_what_they_measure():
    """A metric without a declaration has no label and no direction, and cannot be a goal."""
    assert [c.name for c in cards("evaluator") if not c.metrics] == []


def test_imports_cost_nothing():
    """`import luthier`, the listings and the recipe reader load no torch."""
    code = (
        "import sys, luthier, luthier.registry, luthier.recipe.recipe; luthier.registry.cards(); print([m for"
        " m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
