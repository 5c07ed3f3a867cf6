"""A method's page, for the docs site and, shorter, for the terminal: when to use it, what it costs, a
learning rate to start with, a whole recipe, what its claims measured, its settings and its citation.

Recipes and claims are those of the clone that luthier is run from; without one a page has neither.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from luthier import registry
from luthier.errors import PluginWarning, RecipeError
from luthier.recipe.catalogue import all_papers, claims_folder
from luthier.recipe.recipe import Recipe
from luthier.registry import describe
from luthier.storage.bounded_yaml import read_yaml
from luthier.study.reproduce.page import read_result, status
from luthier.study.reproduce.spec import Claim, claim_names, read_claim

# kinds for whose methods a learning rate is chosen
COMPARED = ("lora", "full")  # tuners whose recipes' learning rates are given beside another's
TRAINED = ("tuner", "objective", "estimator", "transform", "optimizer")


def site_page(card: registry.Card) -> str:
    """The page of the docs site, in Markdown."""
    cls = registry.find(card.kind, card.name)
    lines = [f"# {card.name}", "", *describe.opening(cls), *map(escape, describe.text_of(cls))]
    lines += ["## Costs and requirements", "", *describe.facts(cls), *learning_rate(card, cls)]
    lines += recipe_section(card)
    lines += claims_section(card)
    if describe.settings(cls):
        lines += ["## Settings", "", *describe.settings_table(cls), ""]
    lines += citation(card)
    return "\n".join(lines)


def escape(text: str) -> str:
    """Prose for Markdown: brackets, stars and angles outside of code are no marks."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*\[\]])", r"\\\1", parts[i]).replace("<", "&lt;")
    return "`".join(parts)


def terminal_page(cls: type) -> str:
    """The page of `luthier methods NAME`: the same content, in plain text."""
    card = registry.card(cls.kind, cls.name)
    lines = [f"{card.name} ({card.kind})", "", *describe.opening(cls)]
    lines += [inspect.getdoc(inspect.getmodule(cls)) or "", "", inspect.getdoc(cls) or "", ""]
    lines += describe.facts(cls)
    if not card.use_when and not describe.facts(cls):
        lines.append("")
    path = recipe_of(card)
    lines += [f"In a recipe: {snippet(card)}", ""]
    if path is not None:
        lines += [f"A whole recipe, {path.as_posix()}:", ""]
        lines += [f"    {line}" for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
        lines.append("")
    lines += ["Measured:", "", *measured(card), ""]
    helps = registry.helps(cls)
    settings = describe.settings(cls)
    if settings:
        lines += ["Settings:", ""]
    for field in settings:
        lines.append(f"    {field.name}: {registry.default_of(field)}  # {helps.get(field.name, '')}")
    return "\n".join(lines).rstrip() + "\n"


# ---------------------------------------------------------------------------------------------- learning rate


def learning_rate(card: registry.Card, cls: type) -> list[str]:
    """Where no learning rate is declared: that of its recipe, or a word that none was measured."""
    if card.kind not in TRAINED:
        return []
    lines = []
    model, rate = rate_of(recipe_of(card))
    if rate is not None:
        text = f"The recipe below has a learning rate of {rate:g} for the small model `{model}`"
        compared = []
        if card.kind == "tuner" and card.name not in COMPARED:
            compared = [f"that of `{name}` {tuner_rate(name)}" for name in COMPARED]
        lines.append(", ".join([text, *compared]) + "; larger models take smaller ones.")
    elif not cls.starting_rate and cls.default_rate is None and cls.rate_factor == 1:
        lines.append("No learning rate is recommended for it: start with that of the recipe's tuner.")
    return [*lines, ""]


def rate_of(path: Path | None) -> tuple[str, float | None]:
    """The model and the learning rate of a recipe, of several the default one; None where it has none."""
    if path is None:
        return "", None
    recipe = read_yaml(path)
    rate = recipe.get("learning_rate")
    if isinstance(rate, dict):  # parameter groups have rates of their own
        rate = rate.get("default")
    if rate is None:
        return "", None
    return str(recipe.get("model")), float(rate)


def tuner_rate(name: str) -> str:
    """The learning rate of a tuner's recipe, with its model."""
    model, rate = rate_of(recipe_of(registry.card("tuner", name)))
    return f"has {rate:g} for `{model}`"


# ----------------------------------------------------------------------------------------------------- recipe


def recipe_section(card: registry.Card) -> list[str]:
    """A whole recipe where the repository has one, else how a recipe names it."""
    path = recipe_of(card)
    if path is None:
        return ["## In a recipe", "", f"```{language(card)}", snippet(card), "```", ""]
    text = path.read_text(encoding="utf-8").rstrip()
    lines = ["## A whole recipe", "", f"`luthier tune {path.as_posix()}`", ""]
    return [*lines, "```yaml", text, "```", ""]


def language(card: registry.Card) -> str:
    if card.kind == "compiler":
        return "python"
    return "yaml"


def snippet(card: registry.Card) -> str:
    """How a recipe names a method."""
    return registry.KINDS[card.kind].example.format(card.name)


def recipe_of(card: registry.Card) -> Path | None:
    """The recipe that is named after a method, else the shortest that uses it; relative to the clone."""
    method = (card.kind, card.name)
    for path in recipe_paths():  # to read them all takes seconds, and most methods have one of their name
        if path.stem == card.name and method in methods_of(path):
            return path
    return next(iter(recipes().get(method, [])), None)


@cache
def recipe_paths() -> list[Path]:
    """Recipes of the clone, the shortest first."""
    paths = recipes_folder().rglob("*.yaml")
    return sorted(paths, key=lambda path: (path.stat().st_size, path.name))


@cache
def recipes() -> dict[tuple[str, str], list[Path]]:
    """(kind, name) of a method -> recipes of the clone that name it, the shortest first."""
    users: dict[tuple[str, str], list[Path]] = {}
    for path in recipe_paths():
        for method in sorted(methods_of(path)):
            users.setdefault(method, []).append(path)
    return users


def recipes_folder() -> Path:
    """recipes/ below the working directory, else in the clone that this package is run from."""
    folder = Path("recipes")
    if folder.is_dir():
        return folder
    return Path(__file__).resolve().parents[3] / folder


@cache
def methods_of(path: Path) -> frozenset[tuple[str, str]]:
    """(kind, name) of every method that a recipe names. Nothing of a file that is no valid recipe."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old name is still that method
        warnings.simplefilter("default", PluginWarning)
        try:
            recipe = Recipe.load(path)
            built = {"objective": recipe.aim(), **recipe.methods()}
        except RecipeError:
            return frozenset()
    named = read_yaml(path)
    methods: list[tuple[str, str]] = []
    for key, value in built.items():
        if key in named:
            methods += names_in(value)
    return frozenset(methods)


def names_in(value: Any) -> Iterator[tuple[str, str]]:
    """(kind, name) of a method, of the terms of a sum, and of the methods within."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from names_in(item)
        return
    if hasattr(value, "terms") and getattr(value, "name", "") == "sum":
        for _, term in value.terms():
            yield from names_in(term)
        return
    if hasattr(value, "kind"):
        yield value.kind, value.name
        for inner in registry.submethods(value):
            yield from names_in(inner)


# ----------------------------------------------------------------------------------------------------- claims


def claims_section(card: registry.Card) -> list[str]:
    """What was measured of a paper's claims, with links to the page of claims."""
    lines = [re.sub(r"claim `(\w+)`", r"[claim `\1`](../../claims.md#\1)", line) for line in measured(card)]
    return ["## Measured", "", *lines, ""]


def measured(card: registry.Card) -> list[str]:
    """A list item for each claim about the method; one sentence where there is none."""
    lines = []
    for claim in claims():
        same_row = bool(set(claim.row.split()) & set(card.rows))
        same_paper = claim.paper is not None and claim.paper == card.paper
        if same_row or (same_paper and names_method(claim, card)):
            lines.append(claim_line(claim))
    return lines or ["No claim about it has been measured here yet."]


def names_method(claim: Claim, card: registry.Card) -> bool:
    """Whether a claim's arms use a method: one paper may have several."""
    return f"'{card.name}'" in str([claim.shared, claim.arms])


@cache
def claims() -> tuple[Claim, ...]:
    """Every claim of the clone."""
    if not claims_folder().is_dir():
        return ()
    return tuple(read_claim(name) for name in claim_names())


def claim_line(claim: Claim) -> str:
    """A claim, its verdict, and each difference with its interval."""
    verdict = status(claim)
    line = f"- {claim.claim.strip()} **{verdict[:1].upper()}{verdict[1:]}** (claim `{claim.name}`)"
    result = read_result(claim.name)
    if result is None or result["verdict"] != verdict or "expectations" not in result:
        return line + "."
    differences = []
    for expectation, judged in zip(claim.expectations, result["expectations"]):
        low, high = judged["interval"]
        differences.append(
            f"{expectation.left} - {expectation.right} in {expectation.metric}: {judged['difference']:+.3g}"
            f" (95 %: {low:+.3g} to {high:+.3g})"
        )
    rates = result.get("learning_rates") or {}
    text = f"{line}: {'; '.join(differences)}; {len(result['seeds'])} seeds, toy models."
    if rates and claim.sweep == "learning_rate":
        text += f" Learning rates: {', '.join(f'{arm} {rate:g}' for arm, rate in rates.items())}."
    return text


# --------------------------------------------------------------------------------------------------- citation


def citation(card: registry.Card) -> list[str]:
    """The paper as a link, and as BibTeX where its title and arXiv number are known."""
    if not card.paper:
        return []
    lines = ["## Citation", "", describe.paper_link(card.paper), ""]
    if card.paper.startswith("arXiv:"):
        number = card.paper.removeprefix("arXiv:")
        title = title_of(card)
        entry = f"@misc{{{card.name}, year = {{20{number[:2]}}}, eprint = {{{number}}},"
        if title:
            entry = f"{entry} title = {{{title}}},"
        lines += [
            "```bibtex",
            entry,
            f"  archivePrefix = {{arXiv}}, url = {{https://arxiv.org/abs/{number}}}}}",
            "```",
            "",
        ]
    return lines


def title_of(card: registry.Card) -> str:
    """The title of a method's paper in the catalogue; "" where the catalogue has none or several."""
    titles = []
    for paper in all_papers():
        if paper["name"] in card.rows:
            titles.append(paper["title"])
    if len(titles) != 1:
        return ""
    return titles[0]
