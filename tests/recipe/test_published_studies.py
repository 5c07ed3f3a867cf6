"""Published studies: several methods on the same rows, side by side."""

from __future__ import annotations

import pytest
import torch

import luthier
from helpers.objectives import average, batch_of, cast, network, pair_rows
from helpers.plans import played, report
from luthier.recipe.published import find_published
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.train.checks import check_trainable


def test_four_losses_side_by_side():
    """Four runs that differ in nothing but their loss, and a table with a line for each."""
    recipe = Recipe.load("recipe:dpo-variants-study")
    reports = []
    for number in range(4):
        run = report(f"run-{number}", generated_reward=float(number), generated_tokens=1.0)
        run.before = {"generated_reward": 0.0, "generated_tokens": 1.0}
        reports.append(run)
    (runs,), best = played(recipe.plan, recipe.but(plan=None), [reports])
    assert [run.objective["name"] for run in runs] == ["dpo", "ipo", "kto", "cpo"]
    assert all(run.but(objective="dpo") == runs[0].but(objective="dpo") for run in runs)
    assert best is reports[3] and len(best.stats["table"]) == 4


def test_ipo_rests_at_its_target():
    """The gradient is 0 where the margin is 1 / (2 beta), and has opposite signs on its two sides."""
    ipo = build("objective", {"name": "ipo", "beta": 0.25})
    margin = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    ipo.cost(margin).sum().backward()
    assert margin.grad is not None and margin.grad.tolist() == pytest.approx([-2.0, 0.0, 2.0])


def test_cpo_reads_no_reference():
    """CPO is computed where there is no reference at all; DPO is not."""
    roles, batch = cast(reference=None), batch_of(pair_rows(2))
    assert average(build("objective", "cpo"), roles, batch).isfinite()
    with pytest.raises(AttributeError):
        average(build("objective", "dpo"), roles, batch)


def test_four_tuners_train_what_their_formulas_say():
    """The number of trainable parameters of each of four runs, by the closed forms of their tuners."""
    counts = []
    for run in find_published("peft-unit-tests").recipe["plan"]:
        assert run["init_from"] is None
        tuned = build("tuner", run["tuner"]).attach(network())
        counts.append(check_trainable(tuned)["moving"])
    config = network().config
    d, layers = config.hidden_size, config.num_hidden_layers
    kv = d // config.num_attention_heads * config.num_key_value_heads
    full = sum(p.numel() for p in network().parameters())
    lora = layers * 16 * (2 * (d + d) + 2 * (d + kv))
    assert counts == [full, lora, layers * (2 * kv + config.intermediate_size), 20 * d]


def test_five_tuners_of_code_train_what_their_formulas_say():
    """The same for code; QLoRA trains what LoRA does, above a quantized base."""
    runs = find_published("peft-code-study").recipe["plan"]
    counts = [check_trainable(build("tuner", run["tuner"]).attach(network()))["moving"] for run in runs]
    config = network().config
    d, layers = config.hidden_size, config.num_hidden_layers
    kv = d // config.num_attention_heads * config.num_key_value_heads
    lora = layers * 16 * (2 * (d + d) + 2 * (d + kv))
    ia3 = layers * (2 * kv + config.intermediate_size)
    assert counts == [lora, ia3, 20 * d, layers * 20 * 2 * kv, lora]
    assert all(run["init_from"] is None for run in runs)
    assert [run.get("quantization") for run in runs] == [None, None, None, None, "nf4"]
    assert runs[0]["tuner"] == runs[4]["tuner"]


def test_lora_and_prefixes_differ_in_nothing_but_the_tuner():
    """Two runs on the same rows from the same model, with the trainable parameters of their formulas."""
    pipeline = find_published("code-change-peft-study").recipe
    runs = pipeline["plan"]
    assert [set(run) for run in runs] == [{"tuner", "learning_rate", "init_from"}] * 2
    assert runs[0]["init_from"] is runs[1]["init_from"] is None
    counts = [check_trainable(build("tuner", run["tuner"]).attach(network()))["moving"] for run in runs]
    config = network().config
    d, layers = config.hidden_size, config.num_hidden_layers
    kv = d // config.num_attention_heads * config.num_key_value_heads
    assert counts == [layers * 8 * (2 * d + d + kv), layers * 20 * 2 * kv]


def test_topics_are_measured_by_f1_weighted_by_rows(tmp_path):
    """Tuned on one set of rows and measured on another, whose languages may be others."""
    report = luthier.tune(Recipe.load("recipe:masakhanews"), folder=tmp_path)
    assert {"f1", "f1_weighted", "f1/business", "f1/sports"} <= report.after.keys()
    halves = (report.after["f1/business"] + report.after["f1/sports"]) / 2
    assert report.after["f1_weighted"] == pytest.approx(halves)  # one row of each label in the test
