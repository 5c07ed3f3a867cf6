"""The docs say what the code does: generated pages are current, recipes in pages are valid, links lead
somewhere.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import textwrap

import pytest
import yaml
from typer.main import get_command

import luthier
from helpers.paths import ROOT
from luthier import registry
from luthier.cli import app
from luthier.registry import describe
from luthier.tools import docs
from luthier.tools.method_page import escape, terminal_page

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])
BY_HAND = ("index", "idea", "recipes", "data", "toy", "python", "troubleshooting")


def test_generated_pages_are_up_to_date(capsys):
    assert docs.docs(ROOT / "docs", check=True) == 0, (
        capsys.readouterr().err + "run `python -m luthier.tools.docs`"
    )


@pytest.mark.long
def test_check_tells_what_differs(tmp_path, capsys):
    for name, (begin, end, _) in docs.PARTS.items():
        (tmp_path / name).write_text(f"# R\n{begin}\n{end}\n")
    assert docs.docs(tmp_path, check=False) == 0
    assert docs.docs(tmp_path, check=True) == 0
    (tmp_path / "methods/objective.md").write_text("other\n")
    (tmp_path / "methods/gone.md").write_text("gone\n")
    (tmp_path / "papers.md").unlink()
    (tmp_path / "recipes.md").write_text("# R\n")
    assert docs.docs(tmp_path, check=True) == 1
    said = capsys.readouterr().err
    assert "objective.md is out of date" in said and "gone.md describes no kind of methods" in said
    assert "papers.md is missing" in said and "table of keys" in said


@pytest.mark.long
def test_every_method_has_a_page_with_every_setting():
    made = docs.site_pages()
    for c in registry.cards():
        text = made[f"methods/{c.kind}/{c.name}.md"]
        assert escape(c.summary) in " ".join(text.split())
        assert all(f"| `{f.name}` |" in text for f in describe.settings(registry.find(c.kind, c.name)))


def test_every_method_says_when_to_use_it_and_what_it_costs():
    for c in registry.cards():
        cls = registry.find(c.kind, c.name)
        assert c.use_when == cls.use_when, f"{c.kind} {c.name}"
        assert c.use_when.endswith(".") and not c.use_when.startswith("Use"), f"{c.kind} {c.name}: use_when"
        known = cls.costs or any(getattr(word, "costs", "") for word in c.requires)
        assert known or c.kind == "format", f"{c.kind} {c.name}: costs"


@pytest.mark.long
def test_pages_open_with_when_to_use_a_method():
    text = docs.site_pages()["methods/objective/dpo.md"]
    assert text.startswith("# dpo\n\nUse it when ")
    for part in ("Learning rate:", "## A whole recipe", "## Measured", "## Settings", "```bibtex"):
        assert part in text
    assert terminal_page(registry.find("objective", "dpo")).startswith("dpo (objective)\n\nUse it when ")


@pytest.mark.long
def test_internal_settings_are_on_no_page():
    made = docs.site_pages()
    assert "| `d` |" in made["methods/tuner/intrinsic_dimension.md"]
    assert "| `numbers` |" not in made["methods/tuner/intrinsic_dimension.md"]
    assert "| `counts` |" not in made["methods/tuner/apet.md"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path, monkeypatch):
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)  # recipes and claims of the clone
    docs.write_site(ROOT / "docs", tmp_path / "docs")
    config = load_config(
        str(ROOT / "mkdocs.yml"), docs_dir=str(tmp_path / "docs"), site_dir=str(tmp_path / "site")
    )
    build(config)  # strict: a warning raises
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 250
    for page in pages:
        loaded = re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=.?https?://", page.read_text(encoding="utf-8")
        )
        assert not loaded, f"{page.name} loads something from another server"


def test_every_key_is_in_the_table():
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert all(f"| `{key}` |" in text for key in luthier.Recipe().public())


@pytest.mark.parametrize("page", BY_HAND)
def test_pages_by_hand_exist(page):
    assert len((ROOT / f"docs/{page}.md").read_text(encoding="utf-8")) > 500


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_recipes_in_pages_can_be_read(page):
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        luthier.Recipe.load(yaml.safe_load(block)).yaml()  # builds every method it names


def commands(page) -> list[str]:
    """The lines of a page's shell blocks that begin with luthier."""
    lines = []
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)
    for language, block in blocks:
        if language in ("", "bash", "sh"):
            lines += [line for line in block.splitlines() if line.startswith("luthier ")]
    return lines


def test_commands_in_pages_have_the_options_that_they_use():
    command = get_command(app)
    lines = [line for page in [*PAGES, ROOT / "README.md"] for line in commands(page)]
    assert len(lines) > 25
    for line in lines:
        verb, *words = shlex.split(line, comments=True)[1:]
        command.commands[verb].make_context(verb, words)  # parses; click.UsageError where it cannot


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.name)
def test_python_in_pages_compiles_and_imports_what_there_is(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for node in ast.parse(textwrap.dedent(block)).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("luthier"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_sentences_that_are_explained_are_said():
    """The troubleshooting page quotes the code: a sentence that the code no longer says has no parameter for
    there.
    """
    code = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "src/luthier").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a sentence may go on in the next line
    said = re.sub(r"\{[^{}]*\}", "~", code)
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        q for cell in re.findall(r"^\| (\*.+?\*) \|", page, re.M) for q in re.findall(r"\*([^*]+)\*", cell)
    ]
    assert len(quoted) > 25
    for sentence in quoted:
        parts = re.split(r"\.\.\.|\b[A-Z]+\b|'\w+'|[:;,()?]|`|\bx\b", sentence)  # between names and numbers
        words = max(parts, key=len).strip()
        assert words in said, f"nothing says: {words}"


def test_there_is_a_licence():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:200]


def test_the_method_that_contributing_shows_is_the_real_file():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.search(r"```python\n(.*?)\n```", text, re.S)
    real = ROOT / "src/luthier/methods/tuners/adapters/ssf.py"
    assert shown and shown.group(1) == real.read_text(encoding="utf-8").rstrip()
