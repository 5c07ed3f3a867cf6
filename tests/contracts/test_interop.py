"""Every tuner in transformers' Trainer: trained, saved, read back by the library it belongs to, and resumed;
or refused with a sentence. A new tuner is tested by being there.
"""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from peft import PeftModel

import luthier
from helpers.interop import IDS, ROWS, train
from helpers.tuners import SMALL, TUNERS, base
from helpers.tuners import put as attached
from luthier.errors import RecipeError, Refused
from luthier.interop.attach import TUNED
from luthier.registry import find

FROM_ROWS = ("cofitune", "elastic", "lora_sb", "owlore", "spt")


def put(name: str, kind: str):
    """The tuner on a network, with rows where it asks for them."""
    own = {f.name for f in fields(find("tuner", name))}
    settings = {k: v for k, v in SMALL.items() if k in own}
    try:
        return luthier.attach(base(kind), name, **settings)
    except RecipeError as error:
        if "starts from rows" not in str(error):
            raise
        return luthier.attach(base(kind), name, rows=ROWS, **settings)


def kind_for(name: str) -> str:
    if "label_head" in find("tuner", name).requires:
        return "labels"
    return {"bitfit": "gpt2", "pv_tuning": "codes"}.get(name, "llama")


@pytest.mark.parametrize("name", TUNERS)
def test_saved_read_back_and_resumed(name, tmp_path):
    kind = kind_for(name)
    if attached(name, base(kind)).why_not_elsewhere() is not None:
        with pytest.raises(RecipeError, match="works in luthier.tune only"):
            put(name, kind)
        return
    model = put(name, kind)
    if luthier.callbacks(model):
        with pytest.raises(Refused, match="from step to step"):
            model.train()(input_ids=IDS, labels=IDS)
    before = getattr(model, TUNED).tensors()
    train(model, tmp_path / "run", steps=2, save_steps=1)
    after = getattr(model, TUNED).tensors()
    assert any(not torch.equal(before[k], v) for k, v in after.items() if k in before)
    with torch.no_grad():
        logits = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "end")
    luthier.register_peft()
    if isinstance(model, PeftModel):
        again = PeftModel.from_pretrained(base(kind), str(tmp_path / "end"))
    else:
        again = type(base(kind)).from_pretrained(tmp_path / "end")
    with torch.no_grad():
        assert torch.allclose(again.eval()(IDS).logits, logits, atol=1e-5)
    resumed = put(name, kind)
    train(resumed, tmp_path / "run", steps=2, resume=tmp_path / "run" / "checkpoint-1")
    tensors = getattr(resumed, TUNED).tensors()
    assert tensors.keys() == after.keys() and all(torch.equal(tensors[k], v) for k, v in after.items())


@pytest.mark.parametrize("name", FROM_ROWS)
def test_rows_are_asked_for_where_a_tuner_starts_from_them(name):
    with pytest.raises(RecipeError, match=f"tuner '{name}' starts from rows"):
        luthier.attach(base(kind_for(name)), name)
