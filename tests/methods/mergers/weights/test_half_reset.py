"""half_reset: half reset."""

from __future__ import annotations

import pytest
import torch

from helpers.subset_tuners import put, train
from luthier.errors import RecipeError
from luthier.model.anatomy import layer_of
from luthier.registry import build


def test_half_reset():
    attached = put("full")
    start = attached.tensors()
    train(attached)
    tuned = attached.tensors()
    reset = build("merger", "half_reset").merge([tuned], start)
    back = {k for k, v in reset.items() if torch.equal(v, start[k]) and not torch.equal(start[k], tuned[k])}
    assert all(torch.equal(v, tuned[k]) for k, v in reset.items() if k not in back)
    inside = [k for k in tuned if layer_of(k)]
    share = sum(tuned[k].numel() for k in back) / sum(tuned[k].numel() for k in inside)
    assert back <= set(inside) and abs(share - 0.5) < 0.02
    with pytest.raises(RecipeError, match="takes one run"):
        build("merger", "half_reset").merge([tuned, tuned], start)
