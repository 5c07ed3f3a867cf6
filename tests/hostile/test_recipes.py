"""Recipes that nobody meant: every one is valid or refused in a sentence, before anything is computed."""

from __future__ import annotations

import copy
import random
import traceback
import warnings

import pytest
import yaml

from helpers.hostile import COUNT, SEED, Hang, Tally, hostile_value, limited
from helpers.paths import ROOT
from luthier.data.load import sample_rows
from luthier.errors import RecipeError
from luthier.recipe import catalogue
from luthier.recipe.recipe import DEFAULTS, Recipe
from luthier.recipe.validate import validate
from luthier.run.folder import default_folder

pytestmark = pytest.mark.slow
LONGEST = 3000  # characters of a sentence
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def small(recipe: dict) -> dict:
    """A recipe with few rows: what is tried is the recipe."""
    for key in ("data", "eval_data"):
        value = recipe.get(key)
        if isinstance(value, str) and value.startswith("toy:"):
            recipe[key] = {"path": value, "n": 12}
        elif isinstance(value, dict) and "n" in value:
            value["n"] = 12
    return recipe


def slots(value, path=()):
    """Every place in a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from slots(inner, (*path, key))


def mutated(recipe: dict, chance: random.Random) -> dict:
    """A recipe with one to three changes."""
    recipe = copy.deepcopy(recipe)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(slots(recipe))
        if not places:
            break
        *path, key = chance.choice(places)
        parent = recipe
        for part in path:
            parent = parent[part]
        change = chance.randrange(7)
        if change < 3:
            parent[key] = hostile_value(chance)
        elif change == 3:
            del parent[key]
        elif change == 4:
            parent[key] = [parent[key]]
        elif change == 5:
            parent[key] = {"name": parent[key]}
        elif isinstance(parent, dict):
            parent[chance.choice(sorted(DEFAULTS))] = parent.pop(key)
    return recipe


def torn(text: str, chance: random.Random) -> str:
    """A recipe's text with a few characters or lines changed."""
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(text) + 1)
        piece = chance.choice(
            ("", "[", "{", "]", "}", ":", "- ", "&a ", "*a", "\t", "\0", "'", '"', "!!set ", "<<: ")
        )
        text = text[:place] + piece + text[place + chance.randrange(6) :]
    return text


def attempt(tally: Tally, source, label: str) -> None:
    """Validate a recipe as a run does before it computes anything, and write down what came of it."""
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recipe = Recipe.load(source)
            catalogue.explain(source)
            validate(recipe, sample_rows(recipe), sample_rows)
            default_folder(recipe)
            tally.add("valid")
    except RecipeError as error:
        sentence = str(error)
        if not sentence.strip() or len(sentence) > LONGEST:
            tally.add("tracebacks", f"{label}: no sentence ({len(sentence)} characters): {sentence[:200]}")
        tally.add("refused")
    except Hang:
        where = traceback.format_exc().strip().splitlines()[-8:]
        tally.add("hangs", f"{label}: {source!r:.600}\n" + "\n".join(where))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename.rpartition('/src/')[2]}:{last.lineno}"
        tally.add(
            "tracebacks", f"{label}: {type(error).__name__}: {str(error)[:150]} at {where}\n  {source!r:.400}"
        )


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_key_with_every_hostile_value():
    chance = random.Random(SEED)
    tally = Tally("recipes, every key")
    for key in sorted(DEFAULTS):
        for _ in range(max(1, COUNT // len(DEFAULTS))):
            recipe = {"model": "toy:lm-small", "data": {"path": "toy:arithmetic", "n": 12}}
            recipe[key] = hostile_value(chance)
            attempt(tally, recipe, key)
    tally.close()


def test_mutations_of_the_recipes_here():
    chance = random.Random(SEED)
    tally = Tally("recipes, mutated")
    recipes = [small(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in RECIPES]
    for i in range(COUNT):
        place = chance.randrange(len(RECIPES))
        attempt(tally, mutated(recipes[place], chance), f"{i} {RECIPES[place].stem}")
    tally.close()


def test_torn_texts():
    chance = random.Random(SEED)
    tally = Tally("recipes, torn")
    texts = []
    for path in RECIPES:
        texts.append(yaml.safe_dump(small(yaml.safe_load(path.read_text(encoding="utf-8")))))
    for i in range(COUNT):
        attempt(tally, torn(chance.choice(texts), chance) + "\n", str(i))
    tally.close()


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join(['*' + before] * 9)}]}}\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    "text, words",
    [
        (LAUGHS, "stands for more than"),
        (MERGES, "stands for more than"),
        ("data: &a [*a]\n", "contains itself"),
        ("data: toy:sums\nx: " + "[" * 3000, "levels deep"),
        ("- " * 3000 + "x\n", "levels deep"),
        ("data: toy:sums\ntuner: " + "{name: " * 300 + "x" + "}" * 300 + "\n", "levels deep"),
        ("seed: " + "9" * 5000 + "\n", "invalid YAML"),
        ("seed: 2001-13-45\n", "invalid YAML"),
        ("? [a]\n: b\n", "invalid YAML"),
    ],
    ids=lambda value: value[:12],
)
def test_bombs(text, words):
    with limited(5), pytest.raises(RecipeError, match=words):
        Recipe.load(text)
