"""Tuners in TRL's trainers and in plain loops, and what attaching refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import hub

import luthier
from helpers.interop import IDS, ROWS, train
from helpers.tuners import base
from luthier.errors import RecipeError, Refused
from luthier.interop.attach import STEPS
from luthier.storage import tuner_state


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def plain_loop(model, steps: int, total: int | None = None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    luthier.follow(model, optimizer, total or steps)
    for _ in range(steps):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        yield optimizer
        optimizer.zero_grad()


def test_lisa_draws_layers_in_a_loop_of_ones_own():
    """One layer at a time, in turn; the optimizer keeps the state of what trains."""
    model = luthier.attach(base(), "lisa", n_layers=1, interval=1)
    weights = [layer.mlp.up_proj.weight for layer in model.model.layers]
    moves, before = [], [w.detach().clone() for w in weights]
    for optimizer in plain_loop(model, 6):
        moves.append([not torch.equal(w, b) for w, b in zip(weights, before, strict=True)])
        assert [w in optimizer.state and w.requires_grad for w in weights] == moves[-1]
        before = [w.detach().clone() for w in weights]
    assert {tuple(m) for m in moves} == {(True, False), (False, True)}


def test_places_that_spiel_exchanges_begin_anew_in_the_optimizer():
    model = luthier.attach(base(), "spiel", density=0.02, selection_accumulation_steps=1, reselection_steps=2)
    tuned = model.luthier_tuned
    places = {n: t.clone() for n, t in tuned.frozen_tensors().items() if n.endswith("indices")}
    resets = 0
    steps = getattr(model, STEPS)
    begin = tuned.begin_step

    def watch(clock):
        nonlocal resets
        begin(clock)
        resets += sum(int(mask.sum()) for mask in tuned.resets.values())

    tuned.begin_step = watch
    for _ in plain_loop(model, 6):
        pass
    assert resets and not tuned.resets and steps.clock.step == 6
    now = tuned.frozen_tensors()
    assert any(not torch.equal(now[n], old) for n, old in places.items())


def test_a_loop_that_goes_on_too_long_or_trains_too_little_is_refused():
    model = luthier.attach(base(), "lisa", n_layers=1)
    with pytest.raises(RecipeError, match="announced to have 1 steps"):
        for _ in plain_loop(model, 2, total=1):
            pass
    with pytest.raises(Refused, match="the optimizer lacks"):
        luthier.follow(model, torch.optim.SGD([next(model.parameters())], 0.1), 2)
    with pytest.raises(RecipeError, match="has tuner 'lisa' already"):
        luthier.attach(model, "lora")
    with pytest.raises(RecipeError, match="use what luthier.attach returned"):
        luthier.callbacks(base())


def test_a_tuner_without_steps_needs_nothing():
    model = luthier.attach(base(), "lora", r=4)
    assert luthier.callbacks(model) == []
    before = logits(model)
    for _ in plain_loop(model, 1):
        pass
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "name, settings",
    [("lora", {"r": 4}), ("lora", {"r": 4, "init_lora_weights": "pissa"}), ("spiel", {}), ("prompt", {})],
)
def test_the_network_inside_saves_the_adapter_too(name, settings, tmp_path):
    """Whoever saves the model that was handed to `attach` gets what PEFT's and transformers' readers read."""
    model = base()
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = luthier.attach(model, name, **settings)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    luthier.register_peft()
    readers = (
        [AutoPeftModelForCausalLM] if name == "prompt" else [AutoPeftModelForCausalLM, AutoModelForCausalLM]
    )
    for reader in readers:
        again = reader.from_pretrained(tmp_path / "adapter")
        assert torch.allclose(logits(again), logits(tuned), atol=1e-4)
    if name == "lora":
        expected = logits(tuned)
        tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(logits(again), expected, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["ssf", "hft"])
def test_the_best_checkpoint_is_loaded_at_the_end(name, tmp_path):
    """A learning rate that destroys the model after its first step: that of the first evaluation is left."""
    model = luthier.attach(base(), name)
    often = {"save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "load_best_model_at_end": True}
    trainer = train(
        model, tmp_path, steps=3, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, **often
    )
    best = trainer.state.best_model_checkpoint
    assert trainer.state.global_step == 3
    again = (
        AutoModelForCausalLM.from_pretrained(best)
        if name == "hft"
        else PeftModel.from_pretrained(base(), best)
    )
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_going_on_from_another_place_is_refused(tmp_path):
    model = luthier.attach(base(), "hft")
    train(model, tmp_path / "a", steps=1, save_steps=1)
    (tmp_path / "a" / "checkpoint-1" / tuner_state.NAME).unlink()
    again = luthier.attach(base(), "hft")
    with pytest.raises(Refused, match="tuner 'hft' cannot go on"):
        train(again, tmp_path / "a", steps=2, resume=tmp_path / "a" / "checkpoint-1")


def test_pushed_to_the_hub_is_the_adapter(monkeypatch):
    """A stand-in for the hub takes the names of the files that would be uploaded."""
    files: set[str] = set()

    def commit(self, repo_id, operations, **_):
        files.update(operation.path_in_repo for operation in operations)

    nothing = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: nothing)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", commit)
    luthier.attach(base(), "lora", r=2).push_to_hub("me/mine")
    assert files >= {"adapter_config.json", "adapter_model.safetensors"} and "model.safetensors" not in files


def test_starts_from_the_rows_of_a_trainer():
    rows = [{"input_ids": r["input_ids"], "labels": [-100, -100, *r["labels"][2:]]} for r in ROWS]
    model = luthier.attach(base(), "lora", rows=rows, r=2, init_lora_weights="corda", init_rows=4)
    assert torch.allclose(logits(model), logits(base()), atol=1e-4)
    with pytest.raises(RecipeError, match=r"rows\[0\] has no input_ids"):
        luthier.attach(base(), "lora", rows=[{"text": "a"}], init_lora_weights="corda")


@pytest.mark.long
@pytest.mark.parametrize(
    "name, settings",
    [
        ("lora", {"r": 4, "init_lora_weights": "pissa"}),
        ("lisa", {"n_layers": 1, "interval": 1}),
        ("spiel", {}),
    ],
)
def test_in_trls_trainer_of_preferences(name, settings, tmp_path, shallow):
    """Where TRL adds a second adapter as the reference, the first one is trained, saved and read back."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    rows = [{"prompt": f"{i}+1=", "chosen": f"{i + 1}", "rejected": f"{i + 2}"} for i in range(4)]
    model = luthier.attach(AutoModelForCausalLM.from_pretrained(shallow), name, **settings)
    arguments = trl.DPOConfig(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(shallow),
        callbacks=luthier.callbacks(model),
    )
    trainer.train()
    assert abs(trainer.state.log_history[-1]["train_loss"] - 0.69) < 0.3
    trainer.save_model(str(tmp_path / "end"))
    luthier.register_peft()
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "end" if name == "lisa" else shallow)
    again = network if name == "lisa" else PeftModel.from_pretrained(network, str(tmp_path / "end"))
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
