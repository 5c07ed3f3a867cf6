"""What there is: methods, papers and who implements them, and what a recipe means. Nothing here imports a
network.

`papers.json` holds the short name, title, kind and family of every paper of the catalogue. `write_papers`
makes it from a jsonl file that has these columns among others. Who implements a paper is never written down:
each method's declaration says it (`row="ssf"`), and it is read from there.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import RecipeError
from luthier.recipe.aliases import METHOD_KEYS, NAMES
from luthier.recipe.recipe import Recipe
from luthier.registry import cards, did_you_mean, find, format_value, names, page

PAPERS = Path(__file__).with_name("papers.json")
COLUMNS = ("name", "title", "kind", "family")


# ----------------------------------------------------------------------------------------- methods and papers


def methods(kind: str | None = None) -> list[dict[str, Any]]:
    """Every method, or those of a kind, from the declarations."""
    if kind:
        names(kind)  # an unknown kind is refused with the nearest one
    return [
        {
            "kind": c.kind,
            "name": c.name,
            "paper": c.paper,
            "rows": list(c.rows),
            "requires": sorted(c.requires),
            "provides": sorted(c.provides),
            "summary": c.summary,
        }
        for c in cards(kind)
    ]


def pages(name: str, kind: str | None = None) -> list[str]:
    """What the docs say of each method of this name."""
    means = {
        short: meaning
        for slot, short_for in NAMES.items()
        if kind in (None, METHOD_KEYS[slot])
        for short, meaning in short_for.items()
    }.get(name)
    if means:
        of = means if isinstance(means, str) else means["name"]
        whole = (
            means
            if isinstance(means, str)
            else "{" + ", ".join(f"{k}: {format_value(v)}" for k, v in means.items()) + "}"
        )
        return [f"`{name}` is short for `{whole}`.\n", *pages(of, kind)]
    matches = [c for c in cards(kind) if c.name == name]
    if not matches:
        every = {c.name for c in cards(kind)}
        raise RecipeError(f"there is no {kind or 'method'} '{name}'{did_you_mean(name, every)}")
    return [page(find(c.kind, c.name)).replace(r"\|", "|") for c in matches]


def papers(word: str | None = None) -> list[dict[str, Any]]:
    """The papers of the catalogue whose name, title, kind, family or method holds `word`; `by`: who
    implements each.
    """
    by = implemented()
    matches = [
        {
            "row": p["name"],
            "title": p["title"],
            "kind": p["kind"],
            "family": p["family"],
            "by": by.get(p["name"], []),
        }
        for p in all_papers()
    ]
    if not word:
        return matches
    sought = word.lower()
    return [
        p
        for p in matches
        if sought in " ".join([p["row"], p["title"], p["kind"], p["family"], *p["by"]]).lower()
    ]


@cache
def all_papers() -> tuple[dict[str, str], ...]:
    """papers.json."""
    return tuple(json.loads(PAPERS.read_text(encoding="utf-8")))


def implemented() -> dict[str, list[str]]:
    """Short name of a paper -> 'kind/method' of whatever declares it, and 'claim/name' of the claims that try
    it.
    """
    by = defaultdict(list)
    for c in cards():
        for row in c.rows:
            by[row].append(f"{c.kind}/{c.name}")
    for path in sorted(claims_folder().glob("*.yaml")):
        claim = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows = claim.get("row") if isinstance(claim, dict) else None
        for row in str(rows or "").split():
            by[row].append(f"claim/{path.stem}")
    return dict(by)


def claims_folder() -> Path:
    """benchmarks/claims below the working directory, else in the clone that this package is run from."""
    folder = Path("benchmarks/claims")
    return folder if folder.is_dir() else Path(__file__).resolve().parents[3] / folder


def write_papers(source: Path) -> int:
    """Make papers.json anew from a jsonl file of the catalogue; how many papers it holds."""
    with open(source, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    lines = [json.dumps({k: row[k] for k in COLUMNS}, ensure_ascii=False) for row in rows]
    PAPERS.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    return len(lines)


# ---------------------------------------------------------------------------------------- a recipe, explained


@dataclass(frozen=True)
class Value:
    """One resolved value of a recipe."""

    key: str  # dotted: tuner.r
    value: Any
    origin: str  # default | the recipe file's name | command line

    def as_text(self) -> dict[str, str]:
        """For people: the value as YAML users write it."""
        return {"key": self.key, "value": format_value(self.value), "origin": self.origin}


def explain(source: Any, changes: Sequence[str] = ()) -> tuple[list[Value], tuple[str, ...]]:
    """Every value a recipe comes to and where it was said, and what was understood differently from how it
    was written.

    The methods it names are built and checked, so a recipe that is explained is not refused for a setting
    later.
    """
    recipe, alone = Recipe.load(source, changes), _alone(source)
    values = []
    for key, value in yaml.safe_load(recipe.yaml()).items():
        now, was = _settings(recipe, key), _settings(alone, key)
        for path, leaf in flat(key, value):
            setting = path.removeprefix(f"{key}.").split(".")[0]
            origin = recipe.origins[key]
            if origin != "default" and now:
                unchanged = setting in was and setting in now and was[setting] == now[setting]
                origin = "default" if setting not in now else alone.origins[key] if unchanged else origin
            values.append(Value(path, leaf, origin))
    return values, recipe.warnings


def _alone(source: Any) -> Recipe:
    """What the file says by itself, without changes; the defaults where it makes sense only with them."""
    try:
        return Recipe.load(source)
    except RecipeError:
        return Recipe()


def _settings(recipe: Recipe, key: str) -> dict[str, Any]:
    """The settings written for a method, {name: lora, r: 16}; none for what is not one method, which has one
    origin.
    """
    method = (
        getattr(recipe, key)
        if key in (*METHOD_KEYS, "objective") and recipe.origins.get(key, "default") != "default"
        else None
    )
    if isinstance(method, str) and method.isidentifier() and method != "auto":
        return {"name": method}
    return dict(method) if isinstance(method, Mapping) else {}


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
