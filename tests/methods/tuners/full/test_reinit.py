"""reinit: leaves what lies below."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.subset_tuners import base, put
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.model.anatomy import kind_of, layer_of


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_reinit_leaves_what_lies_below(kind, tmp_path):
    made = base(kind)
    made.save_pretrained(tmp_path)
    # what is loaded is marked by transformers, which then draws nothing anew
    model = type(made).from_pretrained(tmp_path)
    attached, was = put("reinit", model), {n: p.detach().clone() for n, p in model.named_parameters()}
    attached.initialize([], SimpleNamespace(clock=Clock(seed=0, total=1)))
    top = max(
        (layer_of(n) for n in was if layer_of(n)),
        key=lambda place: (place[0].startswith("decoder"), place[1]),
    )
    same = {n for n, p in model.named_parameters() if torch.equal(p, was[n])}
    assert {n for n in was if layer_of(n) != top} <= same
    drawn = {
        n: p.detach() for n, p in model.named_parameters() if layer_of(n) == top and kind_of(n) != "norm"
    }
    assert all(not p.any() for n, p in drawn.items() if n.endswith("bias"))
    weights = [n for n in drawn if n.endswith("weight")]
    assert weights and not same & set(weights)
    if kind in ("llama", "bert"):
        assert all(p.std() == pytest.approx(0.15, rel=0.15) for n, p in drawn.items() if n in weights)
    once = {n: p.detach().clone() for n, p in model.named_parameters()}
    attached.initialize([], SimpleNamespace(clock=Clock(seed=0, total=1)))
    assert all(torch.equal(p, once[n]) for n, p in model.named_parameters())  # the clock alone decides
    with pytest.raises(RecipeError, match="layers: 9"):
        put("reinit", base(kind), layers=9)
