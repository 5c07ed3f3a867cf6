"""Objectives as loss functions of other trainers: the same numbers as luthier's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import luthier
from helpers.interop import ROWS, train
from helpers.tuners import base
from luthier.errors import RecipeError
from luthier.interop.attach import _encoded
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.tuners._base import Untuned
from luthier.model.batch import collate
from luthier.model.policy import Policy
from luthier.recipe.recipe import terms

SPECS = ["sft", "dft", {"name": "sft", "label_smoothing_factor": 0.2}, "sft + 0.5*dft"]
MASKED = []
for place, row in enumerate(ROWS[:4]):
    size = 2 + place
    MASKED.append({"input_ids": row["input_ids"], "labels": [-100] * size + row["labels"][size:]})


def own_loss(model, spec) -> torch.Tensor:
    """As a run of luthier computes it: packed rows, through its own heads."""
    rows = [{**row, "id": str(i)} for i, row in enumerate(MASKED)]
    batch = collate(rows, _encoded)
    roles = SimpleNamespace(policy=Policy(Causal(), model, Untuned(model)))
    total = torch.zeros(())
    for weight, term in terms(spec).terms():
        total = total + weight * term.loss(roles, batch).sum() / term.divisor(batch)
    return total


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_loss_and_its_gradient_are_luthiers(spec):
    model, ours = base(), base()
    ids = torch.tensor([row["input_ids"] for row in MASKED])
    labels = torch.tensor([row["labels"] for row in MASKED])
    value = luthier.trainer_loss(spec)(model(input_ids=ids), labels)
    expected = own_loss(ours, spec)
    assert torch.allclose(value, expected, atol=1e-6)
    value.backward()
    expected.backward()
    pairs = zip(model.parameters(), ours.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in pairs)


def test_sft_is_the_trainers_own_loss(tmp_path):
    models = [base(), base()]
    for model, loss in zip(models, [None, luthier.trainer_loss("sft")], strict=True):
        train(model, tmp_path, callbacks=[], loss=loss, gradient_accumulation_steps=2)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_what_needs_more_than_logits_is_refused():
    for name, reason in {
        "dpo": "requires pairs",
        "core_tuning": "requires hidden",
        "kl": "reference",
    }.items():
        with pytest.raises(RecipeError, match=f"objective '{name}'.*{reason}"):
            luthier.trainer_loss(name)
    ids = torch.tensor([row["input_ids"] for row in MASKED])
    with pytest.raises(RecipeError, match="reads more than the logits"):
        luthier.trainer_loss("masked_thought")(base()(input_ids=ids), ids)
