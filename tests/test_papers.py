"""What `luthier papers` says of each implemented paper: what is there, what is not, which tests show it."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from helpers.paths import ROOT
from luthier.recipe import catalogue

IMPLEMENTED = [paper for paper in catalogue.papers(own=True) if paper["by"]]


@cache
def functions(path):
    """Names of the tests of a file, with their classes."""
    names = set()
    for node in ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8")).body:
        names.add(getattr(node, "name", ""))
        for inner in getattr(node, "body", ()):
            if isinstance(node, ast.ClassDef):
                names.add(f"{node.name}::{getattr(inner, 'name', '')}")
    return names


@pytest.mark.parametrize("paper", IMPLEMENTED, ids=lambda paper: paper["row"])
def test_a_paper_says_what_is_there_and_names_a_test_that_exists(paper):
    tests = [test for part in paper["coverage"] for test in part["tests"]]
    for test in tests:
        path, _, name = test.partition("::")
        assert name.rpartition("::")[2].startswith("test_") and name in functions(path), test
    assert tests and any(part["covers"] for part in paper["coverage"])


def test_a_page_of_a_paper():
    page = "\n".join(catalogue.paper_page("ssf"))
    assert "Implemented by: tuner/ssf" in page
    assert catalogue.paper_page("no-such-paper") == []
    assert catalogue.paper_page("zecoler")[-1] == "No method implements it."


def test_papers_that_tune_nothing_say_so():
    others = catalogue.adjacent()
    assert set(others) == {paper["row"] for paper in catalogue.papers() if paper["family"] == "adjacent"}
    for row, entry in others.items():
        assert any("tunes no foundation model" in line for line in catalogue.paper_page(row))
        for test in entry.tests.split():
            path, _, name = test.partition("::")
            assert name in functions(path), test


def test_a_declaration_of_several_papers_says_it_of_each():
    from luthier.registry import Coverage, coverage_of

    one = coverage_of(["a", "b"], covers="all", tests="x.py::test_1 x.py::test_2")
    assert one["a"] == one["b"] == Coverage("all", "", ("x.py::test_1", "x.py::test_2"))
    two = coverage_of(["a", "b"], covers={"a": "half"}, omits={"a": "the rest"}, tests={"a": "x.py::test_1"})
    assert two == {"a": Coverage("half", "the rest", ("x.py::test_1",))}
