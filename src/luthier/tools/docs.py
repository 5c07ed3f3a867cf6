"""The pages that follow from the declarations. `python -m luthier.tools.docs` writes those of the repository,
`--check` fails where they differ, `--site FOLDER` writes a whole docs folder for the site, with a page for
every method.

In the repository: docs/methods/<kind>.md, docs/papers.md, docs/adjacent.md, docs/claims.md,
docs/published.md, and between two marks the table of keys in docs/recipes.md and the toy tasks in
docs/toy.md. Everything else in docs/ is written by hand.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from luthier import compat, registry
from luthier.recipe.catalogue import adjacent, all_papers, papers
from luthier.recipe.published import published
from luthier.study.reproduce.page import page as claims_page
from luthier.tools.method_page import escape, site_page

BEGIN, END = "<!-- keys: written by luthier.tools.docs -->", "<!-- /keys -->"
TASKS_BEGIN, TASKS_END = "<!-- tasks: written by luthier.tools.docs -->", "<!-- /tasks -->"


def pages() -> dict[str, str]:
    """Path below docs/ -> text, of every generated page of the repository: of luthier's own methods, whatever
    other packages are installed here.
    """
    out = {}
    for kind in registry.KINDS:
        if registry.cards(kind, own=True):
            out[f"methods/{kind}.md"] = tidy(index(kind))
    out["methods/index.md"] = tidy(kinds(own=True))
    out["papers.md"] = tidy(papers_page())
    out["adjacent.md"] = tidy(adjacent_page())
    out["claims.md"] = tidy(claims_page())
    out["compat.md"] = tidy(compat_page())
    out["published.md"] = tidy(published_page())
    return out


def site_pages() -> dict[str, str]:
    """Path below the site's docs folder -> text: a page for every method, other packages' among them, and its
    kinds' pages, which there link to these.
    """
    out = {"methods/index.md": tidy(kinds())}
    for kind in registry.KINDS:
        if families(kind):
            out[f"methods/{kind}.md"] = tidy(site_index(kind))
        for cards in families(kind).values():
            for card in cards:
                out[f"methods/{kind}/{card.name}.md"] = tidy(site_page(card))
    return out


def site_index(kind: str) -> str:
    """The methods of a kind by family, with a link each and when to use it."""
    lines = [f"# {registry.KINDS[kind].title}", ""]
    for family, cards in families(kind).items():
        if len(families(kind)) > 1:
            lines += [f"## {family}", ""]
        lines += ["| name | use it when | paper |", "| - | - | - |"]
        for card in cards:
            when = cell(card.use_when or card.summary)
            anchor = f'<a id="{card.name}"></a>[`{card.name}`]({kind}/{card.name}.md)'
            lines.append(f"| {anchor} | {when} | {link(card.paper)} |")
        lines.append("")
    return "\n".join(lines)


@cache
def families(kind: str) -> dict[str, list[registry.Card]]:
    """Family of a kind (a folder of methods/<kind>) -> its methods; those of other packages apart, without
    what cannot be imported.
    """
    usable = [cls.name for cls in registry.classes(kind)]
    out: dict[str, list[registry.Card]] = {}
    for card in registry.cards(kind):
        if card.name not in usable:
            continue
        parts = card.module.split(".")
        family = "other packages"
        if parts[:2] == ["luthier", "methods"]:
            family = parts[3].replace("_", " ").capitalize()
        out.setdefault(family, []).append(card)
    return dict(sorted(out.items()))


def kinds(own: bool = False) -> str:
    """The kinds of methods, a link each. own: luthier's methods alone are counted."""
    lines = ["# Methods", "", "| kind | what it is | how many |", "| - | - | - |"]
    for kind, about in registry.KINDS.items():
        count = len(registry.cards(kind, own))
        if count:
            lines.append(f"| [{kind}]({kind}.md) | {about.title} | {count} |")
    return "\n".join(lines)


def index(kind: str) -> str:
    """Every method of luthier's of a kind on one page."""
    lines = [f"# {registry.KINDS[kind].title}", ""]
    lines += [
        "`luthier methods --kind " + kind + "` prints the same, `luthier methods NAME` a method's page.",
        "",
    ]
    lines += ["| name | what it does | paper |", "| - | - | - |"]
    for card in registry.cards(kind, own=True):
        lines.append(f'| <a id="{card.name}"></a>`{card.name}` | {cell(card.summary)} | {link(card.paper)} |')
    return "\n".join(lines)


def compat_page() -> str:
    """What is changed in other libraries, and why."""
    lines = [
        "# What luthier touches in other libraries",
        "",
        "In library use every change holds for a run and is taken back at its end; the command line's own"
        " process",
        "keeps them. `src/luthier/compat/` holds all of them.",
        "",
        "| library | what | why |",
        "| - | - | - |",
    ]
    for patch in compat.PATCHES:
        lines.append(f"| {patch.library} | {cell(patch.what)} | {cell(patch.why)} |")
    return "\n".join(lines)


def papers_page() -> str:
    """The papers of the catalogue that a method of luthier's implements or a claim tries."""
    done = [p for p in papers(own=True) if p["by"]]
    total = len(all_papers())
    others = len(adjacent().keys() - {p["row"] for p in done})
    lines = [
        "# Papers",
        "",
        f"{len(done)} of the {total} papers of the catalogue are implemented or tried, {others} more"
        " [tune no foundation model](adjacent.md);"
        " `luthier papers` lists them all, `luthier papers NAME` prints what is said here of one.",
        "",
    ]
    lines += ["| paper | family | method |", "| - | - | - |"]
    for p in sorted(done, key=lambda p: (p["family"], p["title"])):
        by = ", ".join(paper_link(b) for b in p["by"])
        lines += [f"| {cell(p['title'])} | {p['family']} | {by} |"]
    lines += ["", "## What is there, and what is not", ""]
    for p in sorted(done, key=lambda p: p["row"]):
        lines += [f'<a id="{p["row"]}"></a>**{p["row"]}** {p["title"]}', ""]
        for part in p["coverage"]:
            lines += coverage_lines(part)
        lines.append("")
    return "\n".join(lines)


def adjacent_page() -> str:
    """The papers of the catalogue that tune no foundation model, and what stands for each."""
    lines = [
        "# Papers that tune nothing",
        "",
        "Papers of the catalogue that tune no foundation model. What of them can be used in tuning stands",
        "beside them; for the rest there is nothing to tune, and no method pretends to be it.",
        "",
        "| paper | why it is not fine-tuning | in its stead |",
        "| - | - | - |",
    ]
    for row, entry in adjacent().items():
        lines.append(f"| {row} | {cell(entry.why)} | {cell(entry.instead)} |")
    return "\n".join(lines)


def coverage_lines(part: dict[str, Any]) -> list[str]:
    """What a method has of a paper, as entries of a list."""
    lines = [f"- {paper_link(part['by'])} There: {escape(part['covers'] or '-')}"]
    if part["omits"]:
        lines.append(f"  Not there: {escape(part['omits'])}")
    if part["tests"]:
        lines.append(f"  Tests: {', '.join(f'`{test}`' for test in part['tests'])}")
    return lines


def paper_link(source: str) -> str:
    """A method ("tuner/ssf"), a claim ("claim/ssf") or a published recipe ("recipe/tulu-3") as a link from
    docs/.
    """
    kind, _, name = source.partition("/")
    page = {"claim": "claims.md", "recipe": "published.md"}.get(kind, f"methods/{kind}.md")
    return f"[{source}]({page}#{name})"


def published_page() -> str:
    """The pipelines of papers: stages, settings, the rows that they need, and what is not there."""
    lines = [
        "# Published recipes",
        "",
        "Pipelines of papers, with the authors' settings where these are known: under `Not there` stands"
        " which are not. `luthier tune recipe:NAME` runs one on a toy model"
        " and toy rows, in minutes; with `--model` and `--data FOLDER` it runs on yours: the folder has a"
        " file for each kind of rows (`sft.jsonl`, or .parquet, .csv, a folder), or `data.sft=FILE` names"
        " each. Changes are made as in any recipe (`learning_rate=1e-5`); `luthier explain recipe:NAME`"
        " prints every value.",
        "",
    ]
    for name, pipeline in published().items():
        lines += [f'## <a id="{name}"></a>{name}', ""]
        lines += [f"{escape(pipeline.title)} ({link(pipeline.paper)}).", ""]
        lines += ["| rows | what they hold | the authors' | in their stead |", "| - | - | - | - |"]
        for kind, rows in pipeline.rows.items():
            stead = in_stead(rows.toy)
            lines.append(f"| `{kind}` | {cell(rows.holds)} | {cell(rows.source)} | {stead} |")
        lines += ["", f"There: {escape(pipeline.covers)}", "", f"Not there: {escape(pipeline.omits)}", ""]
        lines += ["```yaml", yaml.safe_dump(pipeline.recipe, sort_keys=False, width=110).rstrip(), "```", ""]
    return "\n".join(lines)


def in_stead(rows: Any) -> str:
    """What a pipeline reads at toy scale, in a cell: names of toy rows, or how many rows its file holds."""
    if isinstance(rows, dict):
        return f"`{rows['path']}`"
    named = [in_stead(part) for part in rows if "path" in part]
    return ", ".join(named) if named else f"{len(rows)} rows of its file"


def keys() -> str:
    """A table of every key of a recipe, from the fields of Recipe and their comments."""
    from luthier.recipe.recipe import HIDDEN, Recipe

    helps = registry.helps(Recipe)
    lines = ["| key | default | meaning |", "| - | - | - |"]
    for f in fields(Recipe):
        if f.name in HIDDEN:
            continue
        lines += [f"| `{f.name}` | `{registry.default_of(f)}` | {cell(helps[f.name])} |"]
    return "\n".join(lines)


def toy_tasks() -> str:
    """Every toy task: what it is, its splits, and a row of each kind it is trained and tested on."""
    from luthier import toy
    from luthier.toy.tasks import find

    lines: list[str] = []
    for name in toy.task_names():
        splits, about = find(name).SPLITS, (find(name).__doc__ or "").strip()
        by_kinds: dict[str, list[str]] = {}
        for split, kinds in splits.items():
            by_kinds.setdefault(", ".join(kinds), []).append(f"`{split}`")
        lines += [f"### {name}", "", about, "", "| splits | kinds of row |", "| - | - |"]
        for kinds, names in by_kinds.items():
            lines.append(f"| {', '.join(names)} | {kinds} |")
        example = next(row for split in ("test", "new") for row in toy.rows(name, split, 1))
        columns = ("kind", "prompt", "completion", "messages", "answer")
        row = {k: example[k] for k in columns if k in example}
        lines += ["", "```json", json.dumps(row, ensure_ascii=False), "```", ""]
    return "\n".join(lines)


# page -> marks, what is between
PARTS = {"recipes.md": (BEGIN, END, keys), "toy.md": (TASKS_BEGIN, TASKS_END, toy_tasks)}


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
    if not paper.startswith("arXiv:"):
        return paper
    return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"


def tidy(text: str) -> str:
    """No trailing blanks, no two empty lines together, one line end at the end."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).rstrip() + "\n"


# --------------------------------------------------------------------------------------- writing and checking


def differences(to: Path) -> Iterator[str]:
    """What `python -m luthier.tools.docs` would change, a sentence each."""
    expected = pages()
    for path, text in expected.items():
        here = to / path
        if not here.is_file():
            yield f"{here} is missing"
        elif here.read_text(encoding="utf-8") != text:
            yield f"{here} is out of date"
    for path in sorted((to / "methods").rglob("*.md")):
        if path.relative_to(to).as_posix() not in expected:
            yield f"{path} describes no kind of methods"
    for name, what in (("recipes.md", "the table of keys"), ("toy.md", "the list of toy tasks")):
        page = to / name
        text = page.read_text(encoding="utf-8") if page.is_file() else None
        if text is None or text != between(text, name):
            yield f"{what} in {page} is out of date"


def write(to: Path) -> int:
    """Write every generated page; how many."""
    shutil.rmtree(to / "methods", ignore_errors=True)
    generated = pages()
    for path, text in generated.items():
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        (to / path).write_text(text, encoding="utf-8")
    for name in PARTS:
        page = to / name
        if page.is_file():
            page.write_text(between(page.read_text(encoding="utf-8"), name), encoding="utf-8")
    return len(generated)


def write_site(source: Path, to: Path) -> int:
    """Write a docs folder for the site: the repository's, and a page for every method; how many of these."""
    shutil.copytree(source, to, dirs_exist_ok=True)
    for page in sorted(to.glob("*.md")):
        page.write_text(without_outer_links(page.read_text(encoding="utf-8")), encoding="utf-8")
    generated = site_pages()
    for path, text in generated.items():
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        (to / path).write_text(text, encoding="utf-8")
    return len(generated)


def without_outer_links(text: str) -> str:
    """A page whose links to files of the repository outside docs/ are their names: the site has no such
    files.
    """
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2` in the repository)", text)


def docs(to: Path, check: bool) -> int:
    """Write the repository's pages, or check them; the exit code."""
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
    return int(bool(wrong))


def main() -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m luthier.tools.docs", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="fail where a page differs from the declarations"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("docs"), help="the docs folder")
    # its former name
    parser.add_argument("--to", dest="output_dir", type=Path, default=Path("docs"), help=argparse.SUPPRESS)
    parser.add_argument("--site", type=Path, help="write a docs folder for the site there")
    options = parser.parse_args()
    if options.site:
        print(f"{write_site(options.output_dir, options.site)} pages of methods written below {options.site}")
        return 0
    return docs(options.output_dir, options.check)


if __name__ == "__main__":
    sys.exit(main())
