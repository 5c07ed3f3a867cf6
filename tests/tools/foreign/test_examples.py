"""Every example configuration of every tool becomes a recipe, and no key of it is lost."""

from __future__ import annotations

import pytest
import yaml
from typer.testing import CliRunner

from helpers.paths import FIXTURES
from luthier.cli import app
from luthier.data.sources import resolve_source
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe
from luthier.tools.foreign.convert import TOOLS, import_file
from luthier.tools.foreign.read import read_configuration

FOLDER = FIXTURES / "foreign"
EXAMPLES = sorted(FOLDER.glob("*/*"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_example_is_a_recipe_and_no_key_is_lost(path):
    imported = import_file(path)
    assert imported.tool == TOOLS[path.parent.name].NAME
    assert imported.of("unknown") == []
    assert all(note.why for note in imported.of("dropped") + imported.of("changed"))
    assert all(note.place for note in imported.of("mapped") + imported.of("changed"))
    recipe = Recipe.load(imported.yaml())
    for value in (recipe.data, recipe.eval_data):
        for source in value if isinstance(value, list) else [value]:
            if isinstance(source, dict) and "dataset_info" not in source["path"]:
                resolve_source(source)


@pytest.mark.parametrize("name", TOOLS)
def test_there_are_ten_examples_of_each_tool(name):
    assert len(list((FOLDER / name).iterdir())) >= 10


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.suffix != ".sh"], ids=lambda p: p.name)
def test_keys_are_named_with_what_became_of_them(path):
    imported = import_file(path)
    noted = {note.key for note in imported.notes}
    values = read_configuration(path).values
    for group in ("trl",):
        values |= values.pop(group, {})
    names = {key for key, value in values.items() if value not in (None, "")}
    renamed = {"tuner_type", "max_seq_length"}
    assert names - noted <= renamed


def test_the_command_writes_a_recipe_and_says_what_became_of_the_keys(tmp_path):
    path, recipe = tmp_path / "theirs.yml", tmp_path / "new" / "recipe.yaml"
    text = (FOLDER / "axolotl" / "lora.yml").read_text() + "\nlora_rnak: 3\nnonsense: 1\n"
    path.write_text(text)
    result = CliRunner().invoke(app, ["import", str(path), "--output", str(recipe)])
    assert result.exit_code == 0
    for line in (
        "base_model -> model",
        "dropped: sample_packing: ",
        "unknown: lora_rnak",
        "unknown: nonsense",
    ):
        assert line in result.output
    assert "# unknown: nonsense" in recipe.read_text()
    assert Recipe.load(recipe).methods()["tuner"].r == 16
    refused = CliRunner().invoke(app, ["import", str(path), "--strict"])
    assert refused.exit_code == 2
    assert "lora_rnak, nonsense" in refused.output


def test_without_an_output_the_recipe_is_printed():
    result = CliRunner().invoke(app, ["import", str(FOLDER / "trl" / "sft.yaml")])
    assert yaml.safe_load(result.stdout)["model"] == "Qwen/Qwen2-0.5B"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\n", "no configuration"),
        ("- 1\n", "no `key: value`"),
        ("a: [\n", "neither valid YAML nor JSON"),
        ("base_model: m\nmicro_batch_size: 1\nval_set_size: 0\n", "nothing to train on"),
        ("base_model: Qwen/Qwen2-VL-7B\nmicro_batch_size: 1\ndatasets: [a]\n", "images"),
        ("base_model: m\nprocessor_type: AutoProcessor\nmicro_batch_size: 1\ndatasets: [a]\n", "images"),
        ("base_model: m\nmicro_batch_size: 1\ndatasets: [a]\nrl: nonsense\n", "must be one of"),
        ("rlhf_type: dpo\ntrain_type: lora\nmodel: Qwen/Qwen2.5-VL-3B-Instruct\ndataset: a\n", "images"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused_in_a_sentence(text, words, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        import_file(path)


def test_a_tool_may_be_named(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: a\nlearning_rate: 1e-4\n")
    assert import_file(path, "trl").recipe["data"] == {"path": "a", "split": "train"}
    with pytest.raises(RecipeError, match="did you mean 'trl'"):
        import_file(path, "trll")
