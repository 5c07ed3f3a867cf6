"""luthier from Python: the README's calls, and tuners in other people's loops."""

from __future__ import annotations

import torch

import luthier
from helpers.rows import SUMS
from luthier.registry import build
from luthier.toy.tasks import names


def test_the_calls_of_the_readme(tiny, tmp_path):
    report = luthier.tune(
        model=tiny,
        data=SUMS,
        tuner="lora",
        objective="sft",
        learning_rate=1e-2,
        max_steps=20,
        dtype="float32",
        output_dir=str(tmp_path / "run"),
    )
    assert report.after["loss"] < report.before["loss"] and "retention_loss" in report.after
    tuned = luthier.load(report.folder)
    assert isinstance(tuned.generate("1+1=", max_new_tokens=4), str)
    assert set(dir(luthier)) >= {"tune", "load", "inspect", "Recipe", "Report", "RecipeError"}


def test_a_tuner_in_the_trainer_of_transformers(tiny, tmp_path):
    """Attached in place, trained by transformers.Trainer, saved, and loaded by plain PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    attached = build("tuner", {"name": "lora", "r": 4}).attach(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    rows = [
        {"input_ids": (ids := tokenizer(r["prompt"] + r["completion"]).input_ids), "labels": ids}
        for r in SUMS
        if len(r["completion"]) == 1
    ]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert any(bool(p.any()) for n, p in attached.parameters().items() if n.endswith(".B"))
    attached.save(tmp_path / "adapter")
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        want = model.eval()(ids).logits
        got = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "adapter")
            .eval()(ids)
            .logits
        )
    assert torch.allclose(got, want, atol=1e-5)


def test_fewer_rows_than_a_probe_holds_are_still_of_every_skill(tmp_path):
    keys = {
        "model": "toy:lm-small",
        "data": "toy:topic/train",
        "max_steps": 1,
        "evaluate": [{"name": "forgetting", "n": 54}],
    }
    report = luthier.tune(keys, folder=tmp_path)
    assert {k.partition("/")[2] for k in report.after if "/" in k} == set(names())
