"""What version 0.1.0 wrote is read today: its adapters, its run folders, and recipes in its keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import luthier
from helpers.models import make_tokenizer
from helpers.paths import FIXTURES
from luthier.registry import build, former_metrics
from luthier.report.console import Callback
from luthier.run.folder import default_folder
from luthier.run.upgrade import upgrade_rows
from luthier.storage import files
from luthier.storage.layout import run_folders
from luthier.storage.toy import former_row

FIRST = FIXTURES / "first_edition"


EXPECTED = json.loads((FIRST / "expected.json").read_text(encoding="utf-8"))


ADAPTERS = sorted(path.name for path in (FIRST / "adapters").glob("*"))


FOLDERS = ["sft", "dpo", "plan"]


CLOSE = 5e-3  # processors round differently


IDS = torch.arange(10, 34).reshape(2, 12)


ROWS = [
    {"id": "0", "prompt": "1+2=", "completions": ["3"]},
    {"id": "1", "prompt": "a sum: 4+4=", "completions": ["8, of course"]},
]


def make_base(folder: Path) -> Path:
    """The tiny Llama of the fixtures, its weights drawn by NumPy: the same on every machine."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=262,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
    )
    model = LlamaForCausalLM(config).eval()
    draw = np.random.RandomState(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            numbers = torch.from_numpy(draw.standard_normal(tuple(parameter.shape))).float()
            parameter.copy_(1 + 0.1 * numbers if "norm" in name else 0.2 * numbers)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("first") / "base")


def answers(loaded) -> list[float]:
    """The log-probabilities that a loaded model gives the completions of fixed rows."""
    return loaded.logprobs(ROWS).flatten().tolist()


@torch.no_grad()
def logits(model) -> list[list[float]]:
    """[2, 8] some logits of the last position, through the network's plain forward."""
    return model.eval()(input_ids=IDS).logits[:, -1, :8].float().tolist()


def placed(kind: str, name: str, folder: Path, base: Path) -> Path:
    """A copy of a fixture whose base model is the one made here."""
    copy = Path(shutil.copytree(FIRST / kind / name, folder / name))
    for file in [*copy.rglob("adapter_config.json"), *copy.rglob("recipe.yaml")]:
        file.write_text(file.read_text(encoding="utf-8").replace("BASE", base.as_posix()), encoding="utf-8")
    return copy


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_answer_as_they_did(name, base, tmp_path):
    """Through `luthier.load`, merged unless a recipe lies beside the adapter, and through plain PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, expected = placed("adapters", name, tmp_path, base), EXPECTED["adapters"][name]
    untuned = EXPECTED["base"]["logprobs"]
    assert expected["logprobs"] != pytest.approx(untuned, abs=0.02), "the adapter does something"
    assert answers(luthier.load(folder, dtype="float32")) == pytest.approx(expected["logprobs"], abs=CLOSE)
    if "logits" in expected:  # not on a quantized base, which PEFT does not know of
        luthier.register_peft()
        network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        through_peft = torch.tensor(logits(PeftModel.from_pretrained(network, folder)))
        assert torch.allclose(through_peft, torch.tensor(expected["logits"]), rtol=0, atol=CLOSE)


def test_a_bare_adapter_that_cannot_be_merged_is_refused(base, tmp_path):
    """Without its run's recipe there is only merging, and a bottleneck has no merged form."""
    folder = placed("adapters", "houlsby", tmp_path, base)
    (folder / "recipe.yaml").unlink()
    with pytest.raises(luthier.RecipeError):
        luthier.load(folder, dtype="float32")


@pytest.mark.parametrize("name", FOLDERS)
def test_run_folders_are_read(name, base, tmp_path):
    """The report, and the model itself; of a plan its last run."""
    folder, expected = placed("folders", name, tmp_path, base), EXPECTED["folders"][name]
    report = luthier.Report.read(folder)
    assert report.losses == expected["losses"] and report.after.get("loss") == expected["after_loss"]
    assert report.before.get("loss") == expected["before_loss"]
    for inner, losses in expected["inner"].items():
        assert luthier.Report.read(folder / inner).losses == losses
    trained = folder / max(expected["inner"], default="")
    loaded = luthier.load(trained)
    assert answers(loaded) == pytest.approx(expected["logprobs"], abs=CLOSE)


def test_an_old_recipe_runs(tmp_path):
    report = luthier.tune(FIRST / "old.yaml", output_dir=str(tmp_path / "run"))
    losses = []
    for file in sorted((tmp_path / "run").glob("*/report.json")):
        losses += luthier.Report.read(file.parent).losses
    assert losses == pytest.approx(EXPECTED["old_recipe"], rel=5e-3, abs=1e-4)
    assert Path(report.folder).is_dir()


# ------------------------------------------------------------------------------------------ killed in mid-run


def killed(name: str, folder: Path) -> dict:
    """A run that version 0.1 began, and was killed in, as `run` in a folder; the recipe that it is of."""
    shutil.copytree(FIRST / "killed" / name, folder / "run")
    return yaml.safe_load((FIRST / "killed" / f"{name}.yaml").read_text(encoding="utf-8"))


class Sentences(Callback):
    """The stages of a run beside its sentences."""

    def stage(self, name):
        self.notes.append(name)


@pytest.mark.parametrize("name", ["sft", "grpo", "dr_tune", "plan"])
def test_a_killed_run_goes_on_to_the_same_end(name, tmp_path, monkeypatch):
    """As far as rounding lets one compare: the numbers were made on another machine.

    sft: keys alone. grpo: a role and an online stage under former names, killed within a draw. dr_tune: a
    role whose tensors carry its former name. plan: killed in the second of three runs, in act-1.
    """
    monkeypatch.chdir(tmp_path)  # the plan's second run names the first by its path
    expected, callback = EXPECTED["killed"][name], Sentences()
    report = luthier.tune(killed(name, tmp_path), output_dir="run", callback=callback)
    resumed = [sentence for sentence in callback.notes if sentence.startswith("resuming from checkpoint-")]
    assert len(resumed) == 1
    folders = run_folders(Path("run")) or [Path("run")]
    losses = [line["loss"] for folder in folders for line in files.read_rows(folder / "metrics.jsonl")]
    comparable = 6 if name == "grpo" else None  # after that completions are sampled anew
    assert losses[:comparable] == pytest.approx(expected["losses"][:comparable], rel=5e-3, abs=1e-4)
    assert not report.before.keys() & set(former_metrics()), "metrics are called what they are called now"
    if name == "plan":
        assert [folder.name for folder in folders] == ["act-0", "act-1", "run-2"]


def test_a_killed_run_of_another_recipe_is_refused(tmp_path):
    """The check stands: other settings, other rows, and a recipe that was edited by hand since."""
    recipe = killed("sft", tmp_path)
    folder = tmp_path / "run"

    def refusal(values: dict) -> str:
        with pytest.raises(luthier.RecipeError) as error:
            luthier.tune(values, output_dir=str(folder))
        assert error.value.code == "another_run"
        return str(error.value)

    assert "learning_rate: 0.001 there, 0.002 here" in refusal({**recipe, "learning_rate": 2e-3})
    assert "different rows" in refusal({**recipe, "data": {**recipe["data"], "n": 20}})
    path = folder / "recipe.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("seed: 0", "seed: 1"), encoding="utf-8")
    refusal({**recipe, "seed": 1})


def test_a_killed_run_is_found_under_its_default_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = killed("sft", tmp_path)
    Path("runs").mkdir()
    folder = Path("run").rename("runs/practice-lm-small-lora-sft-0a1b2c")
    assert default_folder(luthier.Recipe.load(recipe)) == folder
    other = {**recipe, "data": {**recipe["data"], "n": 20}}
    assert default_folder(luthier.Recipe.load(other)) != folder


def test_columns_of_a_killed_run_are_renamed(tmp_path):
    """Of the stages that wrote them alone; a column of the data keeps its name."""
    rows = [{"id": "arithmetic/train/0/1", "world": "arithmetic", "old": [[-1.0]], "remembered": "mine"}]
    files.write_rows(tmp_path / "rows.jsonl", rows)
    upgrade_rows(tmp_path / "rows.jsonl", [build("stage", {"name": "rollout", "old": True})])
    (row,) = files.read_rows(tmp_path / "rows.jsonl")
    assert row == {"id": rows[0]["id"], "task": "arithmetic", "old_logprobs": [[-1.0]], "remembered": "mine"}
    assert former_row({"id": row["id"], "task": "arithmetic"}) == {"id": row["id"], "world": "arithmetic"}
