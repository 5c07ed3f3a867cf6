"""The catalogue: methods, papers and which methods implement them, and what a recipe resolves to. Nothing
here imports a network.

`papers.json` holds the short name, title, kind and family of every paper of the catalogue. `write_papers`
makes it from a jsonl file that has these columns among others. Which method implements a paper is read from
the declarations (`row="ssf"`). `adjacent.yaml` says of papers that tune no foundation model why, and what
stands for them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.recipe.aliases import METHOD_KEYS, NAMES
from luthier.recipe.published import published
from luthier.recipe.recipe import Recipe
from luthier.registry import Coverage, cards, coverage_of, did_you_mean, find, format_value, names, page
from luthier.registry.describe import EXCEPTIONS
from luthier.storage.bounded_yaml import load_yaml, read_yaml

PAPERS = Path(__file__).with_name("papers.json")
ADJACENT = Path(__file__).with_name("adjacent.yaml")
COLUMNS = ("name", "title", "kind", "family")


# ----------------------------------------------------------------------------------------- methods and papers


def methods(kind: str | None = None) -> list[dict[str, Any]]:
    """Every method, or those of a kind, from the declarations."""
    if kind:
        names(kind)  # an unknown kind is refused with the nearest one
    listing = []
    for card in cards(kind):
        method = {
            "kind": card.kind,
            "name": card.name,
            "paper": card.paper,
            "rows": list(card.rows),
            "requires": sorted(card.requires),
            "provides": sorted(card.provides),
            "metrics": [metric.name for metric in card.metrics],
            "summary": card.summary,
        }
        listing.append(method)
    return listing


def pages(name: str, kind: str | None = None, write: Callable[[type], str] = page) -> list[str]:
    """The documentation of each method of this name, as `write` writes it of a class. Raises RecipeError
    where there is none.
    """
    for key, aliases in NAMES.items():
        if name not in aliases or kind not in (None, METHOD_KEYS.get(key, key)) or not aliases[name]:
            continue
        meaning = aliases[name]
        if isinstance(meaning, str):
            return [f"`{name}` is short for `{meaning}`.\n", *pages(meaning, kind, write)]
        settings = ", ".join(f"{k}: {format_value(v)}" for k, v in meaning.items())
        return [f"`{name}` is short for `{{{settings}}}`.\n", *pages(meaning["name"], kind, write)]
    texts = []
    other_names = set()
    for card in cards(kind):
        if card.name == name:
            texts.append(write(find(card.kind, card.name)).replace(r"\|", "|"))
        other_names.add(card.name)
    if not texts:
        raise RecipeError(f"there is no {kind or 'method'} '{name}'{did_you_mean(name, other_names)}")
    return texts


def papers(word: str | None = None, own: bool = False) -> list[dict[str, Any]]:
    """The papers of the catalogue whose name, title, kind, family or method contains `word`; `by`: the
    methods that implement each; `coverage`: what each of these has of it; `adjacent`, of papers that tune no
    foundation model: why, and what stands for them. own: luthier's methods alone.
    """
    implementers = implemented(own)
    matches = []
    for paper in all_papers():
        name, title, kind, family = (paper[column] for column in COLUMNS)
        by = implementers.get(name, {})
        text = " ".join([name, title, kind, family, *by])
        if word and word.lower() not in text.lower():
            continue
        coverage = [{"by": source, **asdict(c)} for source, c in by.items() if c != Coverage()]
        match = {
            "row": name,
            "title": title,
            "kind": kind,
            "family": family,
            "by": list(by),
            "coverage": coverage,
            "adjacent": asdict(adjacent()[name]) if name in adjacent() else None,
        }
        matches.append(match)
    return matches


def paper_page(row: str) -> list[str]:
    """The lines about one paper: what of it is there, what is not, and the tests that show it. Empty where
    the catalogue has no paper of this short name.
    """
    for paper in papers():
        if paper["row"] == row:
            break
    else:
        return []
    lines = [f"{row} ({paper['kind']}, {paper['family']})", paper["title"], ""]
    if row in adjacent():
        lines += adjacent()[row].lines()
    elif not paper["by"]:
        return [*lines, "No method implements it."]
    if paper["by"]:
        lines.append(f"Implemented by: {', '.join(paper['by'])}")
    for part in paper["coverage"]:
        lines += ["", part["by"]]
        lines.append(f"    there: {part['covers'] or '-'}")
        lines.append(f"    not there: {part['omits'] or 'nothing that is known'}")
        lines += [f"    test: tests/{test}" for test in part["tests"]]
    return lines


@cache
def all_papers() -> tuple[dict[str, str], ...]:
    """papers.json."""
    return tuple(json.loads(PAPERS.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Adjacent:
    """Why a paper tunes no foundation model, and what stands for it."""

    why: str
    instead: str
    tests: str = ""  # tests that show it, as pytest names them below tests/

    def lines(self) -> list[str]:
        """As `luthier papers NAME` prints it."""
        tests = [f"    test: tests/{test}" for test in self.tests.split()]
        return [f"It tunes no foundation model: {self.why}", f"    in its stead: {self.instead}", *tests]


@cache
def adjacent() -> dict[str, Adjacent]:
    """adjacent.yaml."""
    return {row: Adjacent(**entry) for row, entry in read_yaml(ADJACENT).items()}


def implemented(own: bool = False) -> dict[str, dict[str, Coverage]]:
    """Short name of a paper -> 'kind/method' of whatever declares it, 'claim/name' of the claims that try it,
    and 'recipe/name' of published recipes -> what that has of the paper.
    """
    by: dict[str, dict[str, Coverage]] = defaultdict(dict)
    for c in cards(own=own):
        for row in c.rows:
            by[row][f"{c.kind}/{c.name}"] = c.coverage.get(row, Coverage())
    for path in sorted(claims_folder().glob("*.yaml")):
        claim = read_yaml(path)
        if not isinstance(claim, dict):
            continue
        rows = str(claim.get("row") or "").split()
        words = {key: claim.get(key) or "" for key in ("covers", "omits", "tests")}
        coverage = coverage_of(rows, **words)
        for row in rows:
            by[row][f"claim/{path.stem}"] = coverage.get(row, Coverage())
    for name, pipeline in published().items():
        rows = pipeline.row.split()
        coverage = coverage_of(rows, covers=pipeline.covers, omits=pipeline.omits, tests=pipeline.tests)
        for row in rows:
            by[row][f"recipe/{name}"] = coverage.get(row, Coverage())
    return dict(by)


def claims_folder() -> Path:
    """benchmarks/claims below the working directory, else in the clone that this package is run from."""
    folder = Path("benchmarks/claims")
    if folder.is_dir():
        return folder
    return Path(__file__).resolve().parents[3] / folder


def write_papers(source: Path) -> int:
    """Write papers.json from a jsonl file of the catalogue; how many papers it holds."""
    lines = []
    for line in source.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            row = json.loads(line)
            paper = {column: row[column] for column in COLUMNS}
            lines.append(json.dumps(paper, ensure_ascii=False))
    PAPERS.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    return len(lines)


# ---------------------------------------------------------------------------------------- a recipe, explained


@dataclass(frozen=True)
class Value:
    """One resolved value of a recipe."""

    key: str  # dotted: tuner.r
    value: Any
    origin: str  # default | default: which methods declare it | the recipe file's name | command line

    def as_text(self) -> dict[str, str]:
        """For people: the value as YAML users write it."""
        return {"key": self.key, "value": format_value(self.value), "origin": self.origin}


def explain(source: Any, changes: Sequence[str] = ()) -> tuple[list[Value], tuple[str, ...]]:
    """Every resolved value of a recipe with its origin, and a note for each key that is read as another one.

    The methods that it names are built and checked, so a recipe that is explained is not refused for a
    setting later.
    """
    recipe, alone = Recipe.load(source, changes), _alone(source)
    values = []
    for key, value in load_yaml(recipe.yaml()).items():
        now, was = _settings(recipe, key), _settings(alone, key)
        for path, leaf in flat(key, value):
            setting = path.removeprefix(f"{key}.").split(".")[0]
            origin = recipe.origins[key]
            if origin != "default" and now:
                if setting not in now:
                    origin = "default"
                elif setting in was and was[setting] == now[setting]:
                    origin = alone.origins[key]
            if key == "learning_rate" and origin == "default":
                origin = f"default: {recipe.default_rate().reason}"
            values.append(Value(path, leaf, origin))
    return values, (*recipe.warnings, *dependencies(recipe))


def dependencies(recipe: Recipe) -> list[str]:
    """Sentences on methods whose results depend on how the rows of a step are divided."""
    sentences = []
    methods = [recipe.methods()[key] for key in ("tuner", "estimator")]
    if recipe.objective is not None:
        methods += [term for _, term in recipe.aim().terms()]
    for method in methods:
        for test, label in EXCEPTIONS.items():
            if reason := getattr(method, "contract", {}).get(test):
                sentences.append(f"{method.name}: {label[0].lower()}{label[1:]}: {reason}")
    return sentences


def _alone(source: Any) -> Recipe:
    """The recipe of the file without changes; the defaults where it is valid only with them."""
    try:
        return Recipe.load(source)
    except RecipeError:
        return Recipe()


def _settings(recipe: Recipe, key: str) -> dict[str, Any]:
    """The settings written for a method, {name: lora, r: 16}; none for what is not one method, which has one
    origin.
    """
    if key not in (*METHOD_KEYS, "objective") or recipe.origins.get(key, "default") == "default":
        return {}
    method = getattr(recipe, key)
    if isinstance(method, Mapping):
        return dict(method)
    if isinstance(method, str) and method.isidentifier() and method != "auto":
        return {"name": method}
    return {}


def flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A nested value as (dotted key, leaf); a list of plain values is a leaf."""
    if isinstance(value, Mapping) and value:
        for k, v in value.items():
            yield from flat(f"{key}.{k}", v)
    elif isinstance(value, list) and any(isinstance(v, (Mapping, list)) for v in value):
        for i, v in enumerate(value):
            yield from flat(f"{key}.{i}", v)
    else:
        yield key, value
