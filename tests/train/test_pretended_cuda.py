"""What a step asks of a GPU, counted on a pretended one, and that nothing raises there. A real GPU may still
differ: in its kernels' numbers, in memory, in time.
"""

from __future__ import annotations

import pytest
import torch
import yaml

import luthier
from helpers.models import make_llama, make_tokenizer
from helpers.paths import ROOT
from helpers.pretended_cuda import Counts, DeviceFault, pretended_cuda
from helpers.rows import PAIRS, SUMS
from luthier.train.trainer import Trainer

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
LAYERS = 2
BASE = {
    "tuner": "lora",
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "evaluate": [],
    "eval_data": 0,
}


@pytest.fixture(scope="module")
def heads_of_16(tmp_path_factory) -> str:
    """The folder of a Llama whose heads flash attention takes."""
    folder = tmp_path_factory.mktemp("heads_of_16")
    make_llama(num_hidden_layers=LAYERS, hidden_size=64).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def counted(monkeypatch, tmp_path, **recipe) -> tuple[Counts, luthier.Report]:
    """What the last step asked for, and the report."""
    step, last = Trainer.step, Counts()

    def alone(self):
        counts.clear()
        log = step(self)
        for name in ("launches", "syncs", "operations"):
            setattr(last, name, getattr(counts, name).copy())
        return log

    monkeypatch.setattr(Trainer, "step", alone)
    with pretended_cuda() as counts:
        report = luthier.tune(BASE | {"data": SUMS[:8]} | recipe, folder=tmp_path / "run")
    monkeypatch.undo()
    return last, report


@pytest.mark.long
def test_a_step_of_lora_is_few_launches_and_one_reading(monkeypatch, heads_of_16, tmp_path):
    counts, _ = counted(monkeypatch, tmp_path, model=heads_of_16, dtype="bfloat16")
    assert counts.syncs.total() == 1, counts.syncs
    # with the 30 layers of SmolLM2-135M this is 2,500
    assert counts.launches.total() <= 80 * LAYERS + 100, counts.operations.most_common(20)
    assert counts.operations["_flash_attention_backward"] == LAYERS


@pytest.mark.long
def test_a_step_of_dpo_reads_its_numbers_once(monkeypatch, heads_of_16, tmp_path):
    how = {"data": PAIRS[:8], "objective": "dpo", "dtype": "bfloat16"}
    counts, _ = counted(monkeypatch, tmp_path, model=heads_of_16, **how)
    assert counts.syncs.total() <= 3, counts.syncs
    assert counts.operations["_flash_attention_backward"] == 2 * LAYERS, "prompts are read once for both"


@pytest.mark.long
def test_the_numbers_are_those_of_a_cpu(monkeypatch, heads_of_16, tmp_path):
    how = {"model": heads_of_16, "dtype": "float32", "tuner": "full", "learning_rate": 1e-3}
    _, report = counted(monkeypatch, tmp_path, **how)
    on_cpu = luthier.tune(BASE | {"data": SUMS[:8]} | how, folder=tmp_path / "cpu")
    assert report.losses == pytest.approx(on_cpu.losses, rel=1e-5)


def test_what_cuda_refuses_is_refused():
    with pretended_cuda() as counts:
        here = torch.ones(3, device="cuda:0")
        with pytest.raises(DeviceFault):
            here + torch.ones(3)
        with pytest.raises(TypeError):
            here.numpy()
        with pytest.raises(DeviceFault):
            torch.ones(3)[torch.ones(1, dtype=torch.long, device="cuda:0")]
        with pytest.raises(DeviceFault):
            torch.randn(3, device="cuda:0", generator=torch.Generator())
        counts.clear()
        assert float((here * 2).sum()) == 6
        assert counts.launches.total() == 3 and counts.syncs.total() == 1
    assert not torch.cuda.is_available() or torch.cuda.device_count()


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(path.read_text("utf-8"))
    for key in ("data", "eval_data"):
        source = recipe.get(key)
        if isinstance(source, dict) and "n" in source:
            source["n"] = min(source["n"], 24)
    recipe.pop("num_train_epochs", None)
    recipe |= {"max_steps": 2, "evaluate": ["loss"], "output_dir": str(tmp_path / "run")}
    with pretended_cuda():
        luthier.tune(recipe)
