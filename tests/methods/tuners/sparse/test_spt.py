"""spt: plan; on a model; puts the budget where the task is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel

from helpers.subset_tuners import ROWS, base, batch, put, roles_of, say, train
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.tuners._base import Untuned
from luthier.registry import find


def test_spt_plan():
    """The budget is met; the most sensitive entries move; alpha decides between entries and LoRA."""
    torch.manual_seed(0)
    scores = {"a": torch.rand(8, 8), "b": 10 * torch.rand(8, 8), "c": 0.1 * torch.rand(8, 8)}
    spt = find("tuner", "spt")
    plan, places = spt(budget=50, alpha=0.0, r=1).planned(scores)
    assert (
        sum(plan.values()) == 50 and all(v >= 0 for v in plan.values()) and plan["b"] == 50 - plan["a"] > 40
    )
    assert set(places["b"].tolist()) == set(scores["b"].flatten().topk(plan["b"]).indices.tolist())
    plan, _ = spt(budget=50, alpha=1e9, r=1).planned(scores)
    assert set(plan.values()) <= {-1, 0} and plan["b"] == -1
    plan, _ = spt(budget=50, alpha=1.0, r=2).planned(scores)
    assert plan["b"] == -2 and plan["a"] + plan["c"] == 50 - 2 * 16 and plan["a"] > 0


def test_spt_on_a_model(tmp_path):
    attached = put("spt", budget=600, alpha=10.0, r=2)
    assert abs(sum(p.numel() for p in attached.parameters().values()) - 600) <= 12
    attached.initialize(ROWS, roles_of(attached))
    moving = sum(p.numel() for p in attached.parameters().values())
    assert abs(moving - 600) <= 12 and any(v < 0 for v in attached.settings.plan.values())
    assert torch.equal(say(attached.model), say(base()))
    full = base()
    Causal().forward(full, Untuned(full), batch()).logprobs.mean().neg().backward()
    from luthier.model.statistics import gather

    name = "model.layers.1.self_attn.o_proj"
    again = put("spt", budget=600)
    got = gather("squared_gradients", {name: again.layers[name].get_base_layer()}, ROWS, roles_of(again))[
        name
    ]
    assert np.allclose(
        got.numpy(), np.square(full.get_submodule(name).weight.grad.numpy()), rtol=1e-3, atol=1e-9
    )
    before = attached.tensors()
    train(attached)
    assert all(
        not torch.equal(v, before[k])
        for k, v in attached.tensors().items()
        if k.endswith((".values", ".B")) and v.numel()
    )
    attached.save(tmp_path)
    assert torch.allclose(
        say(PeftModel.from_pretrained(base(), tmp_path).eval()), say(attached.model), atol=1e-5
    )
    other = put("spt", budget=600)
    other.load(attached.tensors())  # a plan shows in the shapes
    assert torch.equal(say(other.model), say(attached.model))


def test_spt_puts_the_budget_where_the_task_is():
    """A network of which only one layer matters."""
    model = base()
    with torch.no_grad():
        for i in (0, 1, 3):
            model.model.layers[i].self_attn.o_proj.weight.zero_()
            model.model.layers[i].mlp.down_proj.weight.zero_()
    attached = put("spt", model, budget=400, alpha=0.0, exclude_modules=["o_proj", "down_proj"])
    attached.initialize(ROWS, roles_of(attached))
    there = sum(v for n, v in attached.settings.plan.items() if ".layers.2." in n)
    assert there > 0.8 * 400


def test_a_plan_with_low_rank_parts_is_exported_as_lora(tmp_path):
    attached = put("spt", budget=600, alpha=10.0, r=2)
    attached.initialize(ROWS, roles_of(attached))
    assert any(v < 0 for v in attached.settings.plan.values())
    train(attached)
    attached.export_lora(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.allclose(say(again), say(attached.model), atol=1e-4)


def test_spt_trains_vectors_whole(tmp_path):
    """Norms and biases take part: whole where a fifth of their numbers is marked, else entry by entry."""
    spt = find("tuner", "spt")
    scores = {"w": torch.zeros(8, 8), "n.weight": torch.zeros(10), "w.bias": torch.zeros(10)}
    scores["w"][0] = 1.0
    scores["n.weight"][:2], scores["w.bias"][4] = 2.0, 2.0
    plan, places = spt(budget=15, alpha=0.0, vectors=True).planned(scores)
    assert plan == {"w": 4, "n.weight": 10, "w.bias": 1} and places["w.bias"].tolist() == [4]
    assert places["n.weight"].tolist() == list(range(10))
    plan, _ = spt(budget=15, alpha=0.0, beta=0.0, vectors=True).planned(scores)
    assert plan["n.weight"] == 2
    for kind in ("gpt2", "llama"):
        attached = put("spt", base(kind), budget=900, vectors=True, r=2)
        attached.initialize(ROWS, roles_of(attached))
        moving = sum(p.numel() for p in attached.parameters().values())
        assert abs(moving - 900) <= 0.02 * 900
        plan = attached.settings.plan
        assert any(v > 0 for n, v in plan.items() if n.endswith(".weight"))
        assert kind == "llama" or any(v > 0 for n, v in plan.items() if n.endswith(".bias"))
        assert torch.allclose(say(attached.model), say(base(kind)), atol=1e-5)
        train(attached)
        tuned = say(attached.model)
        with attached.merged():
            assert torch.allclose(say(attached.model), tuned, atol=1e-4)
        attached.save(tmp_path / kind)
        again = PeftModel.from_pretrained(base(kind), tmp_path / kind).eval()
        assert torch.allclose(say(again), tuned, atol=1e-5)
        other = put("spt", base(kind), budget=900, vectors=True, r=2)
        other.load(attached.tensors())
        assert torch.equal(say(other.model), tuned)


def test_spt_with_adapters(tmp_path):
    attached = put("spt", budget=1200, alpha=100.0, r=2, structure="adapter")
    attached.initialize(ROWS, roles_of(attached))
    adapters = [n for n, v in attached.settings.plan.items() if v == -2]
    assert adapters and torch.equal(say(attached.model), say(base()))
    out = attached.layers[adapters[0]].get_base_layer().out_features
    own = attached.layers[adapters[0]].adapter_params["default"]
    assert sum(p.numel() for p in own.parameters()) == 2 * 2 * out + 2 + out
    train(attached)
    assert own.up.any() and own.down_bias.any()
    attached.save(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.allclose(say(again), say(attached.model), atol=1e-5)
    with pytest.raises(RecipeError, match="cannot be merged"), attached.merged():
        pass
    with pytest.raises(RecipeError, match="no LoRA form"):
        attached.export_lora(tmp_path)
