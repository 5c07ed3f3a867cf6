"""The pages that follow from the declarations: `python -m luthier.tools.docs` writes them, `--check` fails
where they differ.

docs/methods/<kind>/<name>.md for each method, docs/methods/index.md, docs/papers.md, docs/claims.md, and
between two marks the table of keys in docs/recipes.md and the worlds in docs/practice.md. Everything else in
docs/ is written by hand.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from luthier import registry
from luthier.recipe.catalogue import known, papers
from luthier.study.reproduce.page import page as claims_page

BEGIN, END = "<!-- keys: written by luthier.tools.docs -->", "<!-- /keys -->"
WORLDS_BEGIN, WORLDS_END = "<!-- worlds: written by luthier.tools.docs -->", "<!-- /worlds -->"


def pages() -> dict[str, str]:
    """Path below docs/ -> text, of every page that is wholly generated."""
    made = {
        f"methods/{c.kind}/{c.name}.md": tidy(registry.page(registry.find(c.kind, c.name)))
        for c in registry.cards()
    }
    return {
        **made,
        "methods/index.md": tidy(index()),
        "papers.md": tidy(papers_page()),
        "claims.md": tidy(claims_page()),
    }


def index() -> str:
    """Every method on one page."""
    lines = [
        "# Methods",
        "",
        "Written from the declarations. `luthier methods` prints the same in a terminal.",
        "",
    ]
    for kind in registry.KINDS:
        some = registry.cards(kind)
        if some:
            lines += [
                f"## {registry.KINDS[kind].title}",
                "",
                "| name | what it is | paper |",
                "| - | - | - |",
            ]
            lines += [
                f"| [{c.name}]({kind}/{c.name}.md) | {cell(c.summary)} | {link(c.paper)} |" for c in some
            ]
            lines += [""]
    return "\n".join(lines)


def papers_page() -> str:
    """The papers of the catalogue that a method implements or a claim tries."""
    done = [p for p in papers() if p["by"]]
    lines = ["# Papers", ""]
    lines += [
        (
            f"{len(done)} of the {len(known())} papers of the catalogue are implemented or tried; `luthier"
            " papers` lists them all."
        ),
        "",
    ]
    lines += ["| paper | family | method |", "| - | - | - |"]
    for p in sorted(done, key=lambda p: (p["family"], p["title"])):
        by = ", ".join(
            f"[{b}]({f'claims.md#{b[6:]}' if b.startswith('claim/') else f'methods/{b}.md'})" for b in p["by"]
        )
        lines += [f"| {cell(p['title'])} | {p['family']} | {by} |"]
    return "\n".join(lines)


def keys() -> str:
    """A table of every key of a recipe, from the fields of Recipe and their comments."""
    from luthier.recipe.recipe import Recipe

    said = registry.helps(Recipe)
    lines = ["| key | default | meaning |", "| - | - | - |"]
    for f in fields(Recipe):
        if f.name in ("origins", "told"):
            continue
        lines += [f"| `{f.name}` | `{registry.default_of(f)}` | {cell(said[f.name])} |"]
    return "\n".join(lines)


def worlds() -> str:
    """Every practice world: what it is, its splits, and a row of each kind it is trained and tested on."""
    from luthier import toy as practice
    from luthier.toy.tasks import find

    lines: list[str] = []
    for name in practice.worlds():
        splits, said = find(name).SPLITS, (find(name).__doc__ or "").strip()
        by_kinds: dict[str, list[str]] = {}
        for split, kinds in splits.items():
            by_kinds.setdefault(", ".join(kinds), []).append(f"`{split}`")
        lines += [f"### {name}", "", said, "", "| splits | kinds of row |", "| - | - |"]
        lines += [f"| {', '.join(names)} | {kinds} |" for kinds, names in by_kinds.items()]
        example = next(row for split in ("test", "new") for row in practice.rows(name, split, 1))
        told = {k: example[k] for k in ("kind", "prompt", "completion", "messages", "answer") if k in example}
        lines += ["", "```json", json.dumps(told, ensure_ascii=False), "```", ""]
    return "\n".join(lines)


# page -> marks, what is between
PARTS = {"recipes.md": (BEGIN, END, keys), "practice.md": (WORLDS_BEGIN, WORLDS_END, worlds)}


def between(text: str, page: str = "recipes.md") -> str:
    """A page with its generated part as it should be."""
    begin, end, part = PARTS[page]
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{part()}\n{end}{tail}"


def cell(text: str) -> str:
    """Text inside a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def link(paper: str | None) -> str:
    if not paper:
        return ""
    return (
        f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
        if paper.startswith("arXiv:")
        else paper
    )


def tidy(text: str) -> str:
    """No trailing blanks, no two empty lines together, one line end at the end."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).rstrip() + "\n"


# ---------------------------------------------------------------------------------------------- writing and checking


def differences(to: Path) -> Iterator[str]:
    """What `python -m luthier.tools.docs` would change, a sentence each."""
    made = pages()
    for path, text in made.items():
        here = to / path
        if not here.is_file():
            yield f"{here} is missing"
        elif here.read_text(encoding="utf-8") != text:
            yield f"{here} is out of date"
    for path in sorted((to / "methods").rglob("*.md")):
        if path.relative_to(to).as_posix() not in made:
            yield f"{path} describes a method that is not there"
    for name, what in (("recipes.md", "the table of keys"), ("practice.md", "the list of worlds")):
        page = to / name
        if not page.is_file() or page.read_text(encoding="utf-8") != between(
            page.read_text(encoding="utf-8"), name
        ):
            yield f"{what} in {page} is out of date"


def write(to: Path) -> int:
    """Write every generated page; how many."""
    shutil.rmtree(to / "methods", ignore_errors=True)
    made = pages()
    for path, text in made.items():
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        (to / path).write_text(text, encoding="utf-8")
    for name in PARTS:
        page = to / name
        if page.is_file():
            page.write_text(between(page.read_text(encoding="utf-8"), name), encoding="utf-8")
    return len(made)


def docs(to: Path, check: bool) -> int:
    """The exit code of `luthier docs`."""
    if not check:
        print(f"{write(to)} pages written below {to}")
        return 0
    wrong = list(differences(to))
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    if wrong:
        print(
            f"{len(wrong)} pages differ from the declarations: run `python -m luthier.tools.docs`",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def main() -> int:
    import argparse

    asked = argparse.ArgumentParser(
        prog="python -m luthier.tools.docs", description=__doc__.split("\n", 1)[0]
    )
    asked.add_argument("--check", action="store_true", help="fail where a page differs from the declarations")
    asked.add_argument("--to", type=Path, default=Path("docs"), help="the docs folder")
    given = asked.parse_args()
    return docs(given.to, given.check)


if __name__ == "__main__":
    sys.exit(main())
